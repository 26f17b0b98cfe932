"""Which combinations are not drawn, and why."""

from between import (
    another_call,
    copied,
    nothing,
    pickled,
    read_under_autocast,
    read_under_inference_mode,
    read_without_gradients,
    saved,
)
from calls import embedded
from modes import CHECKPOINT, LAYERS, REENTRANT, REENTRANT_LAYERS
from paddings import PADDINGS, SQUARE, a_row_of_padding, booleans, left_with_positions, windows
from readers import hooked

CHECKPOINTS = (CHECKPOINT, REENTRANT, LAYERS, REENTRANT_LAYERS)
_CHANGES_NOTHING = (
    *(nothing, another_call, copied, pickled, saved, read_under_autocast, read_under_inference_mode),
    read_without_gradients,
)

# What stock itself cannot do, or does not do twice in the same way.
RULES = {
    "eager attention adds its mask, which True and False are not meant for": lambda case: (
        case.padding is booleans and (case.attention == "eager" or case.head.startswith("MPNet"))
    ),
    "choices are flattened, a mask (B, 1, S, S) is not, nor GPT-2's and DistilBERT's positions": lambda case: (
        (case.padding in SQUARE and ("MultipleChoice" in case.head or "DoubleHeads" in case.head))
        or (
            case.padding is left_with_positions
            and ("DoubleHeads" in case.head or case.head == "DistilBertForMultipleChoice")
        )
    ),
    "ELECTRA's discriminator picks the rows of its loss by the mask": lambda case: (
        case.padding in SQUARE and case.head == "ElectraForPreTraining"
    ),
    "GPT-2's classifier looks for padding in the tokens, and its choices are flattened as tokens": lambda case: (
        case.call is embedded and case.head in ("GPT2ForSequenceClassification", "GPT2DoubleHeadsModel")
    ),
    "ESM scales its embeddings by the mask, and divides by a row's length": lambda case: (
        case.head.startswith("Esm") and (case.padding in SQUARE or case.padding is a_row_of_padding)
    ),
    "DeBERTa scales its embeddings by the mask": lambda case: (
        case.head.startswith("Deberta") and case.padding in SQUARE
    ),
    "DeBERTa's layers share a table that is normalised once, and each reentrant checkpoint runs backward through it": (
        lambda case: case.head.startswith("Deberta") and case.mode is REENTRANT_LAYERS
    ),
    "ALBERT's and MPNet's layers have no checkpoints": lambda case: (
        case.head.startswith(("Albert", "MPNet")) and case.mode in (LAYERS, REENTRANT_LAYERS)
    ),
    "backward of a checkpoint runs the model again, as it is then": lambda case: (
        case.mode in CHECKPOINTS and case.between not in _CHANGES_NOTHING
    ),
}

# Limits of a patched model.
RULES |= {
    "a hook that is put on a promised tensor between its readers would see a part of the gradient, and is refused": (
        lambda case: (
            hooked in case.readers
            and (len(case.readers) > 1 or case.mode is REENTRANT_LAYERS or case.head == "ModernBertForMultipleChoice")
        )
    ),
}


def why_not(case):
    return next((why for why, rule in RULES.items() if rule(case)), None)


# Where dropout is fasttune's in all of the model: not under a mask of another kind, whose attention is torch's.
OWN_ATTENTION = {"attention": ("sdpa",), "padding": tuple(padding for padding in PADDINGS if padding is not windows)}
