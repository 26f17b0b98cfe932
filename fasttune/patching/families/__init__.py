"""The model families, looked up by the module that defines a model's class and imported only then."""

from __future__ import annotations

import importlib

from torch import nn

from fasttune.patching.families.spec import Family

# module of Transformers -> module here
FAMILIES = {
    "transformers.models.gpt2.modeling_gpt2": "gpt2",
    "transformers.models.bert.modeling_bert": "bert",
    "transformers.models.roberta.modeling_roberta": "roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta": "xlm_roberta",
    "transformers.models.camembert.modeling_camembert": "camembert",
    "transformers.models.electra.modeling_electra": "electra",
    "transformers.models.distilbert.modeling_distilbert": "distilbert",
    "transformers.models.mpnet.modeling_mpnet": "mpnet",
    "transformers.models.deberta_v2.modeling_deberta_v2": "deberta_v2",
    "transformers.models.albert.modeling_albert": "albert",
    "transformers.models.modernbert.modeling_modernbert": "modernbert",
    "transformers.models.modernbert_decoder.modeling_modernbert_decoder": "modernbert_decoder",
    "transformers.models.esm.modeling_esm": "esm",
}


def family_named(name: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family


def family_of(model: nn.Module) -> Family | None:
    """The family that supports this model's class or a class it derives from."""
    for cls in type(model).__mro__:
        name = FAMILIES.get(cls.__module__)
        if name is not None and cls in family_named(name).heads:
            return family_named(name)
    return None


def supported_models() -> str:
    """For an error message: every model class that `patch` accepts."""
    try:
        families = [family_named(name) for name in FAMILIES.values()]
    except ImportError as error:
        return f"{', '.join(FAMILIES.values())} (their classes cannot be listed: {error})"
    return "; ".join(f"{family.name}: {', '.join(cls.__name__ for cls in family.heads)}" for family in families)
