"""The colours of the plots."""

INK, GREY, STOCK, FASTTUNE = "#1f2430", "#8a8f98", "#c0653a", "#1c7c7d"
