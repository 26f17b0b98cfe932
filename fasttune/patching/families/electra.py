"""ELECTRA: generator and discriminator."""

from transformers.models.electra import modeling_electra as stock

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.families._activations import why_no_gelu
from fasttune.patching.rows import (
    all_rows,
    first_row,
    for_the_caller,
    labelled,
    labelled_next,
    labelled_tokens,
    real_if_labelled,
    summary_row,
)


class ElectraEmbeddings(shared.SumNormDropout, stock.ElectraEmbeddings): ...


class ElectraLayer(shared.PackedLayer, stock.ElectraLayer): ...


class ElectraSelfOutput(shared.DenseDropoutAddNorm, stock.ElectraSelfOutput): ...


class ElectraOutput(shared.DenseDropoutAddNorm, stock.ElectraOutput): ...


class ElectraIntermediate(shared.DenseGelu, stock.ElectraIntermediate): ...


class ElectraGeneratorPredictions(shared.DenseGeluNorm, stock.ElectraGeneratorPredictions):
    activation_name = "activation"


FAMILY = shared.bert_like(
    "electra",
    stock,
    globals(),
    prefix="Electra",
    vocabulary="generator_lm_head",
    transform="ElectraGeneratorPredictions",
    transform_covers=("LayerNorm", "activation"),
    transform_unsuited=why_no_gelu("activation"),
    heads={
        "ElectraModel": for_the_caller,
        "ElectraForMaskedLM": labelled,
        "ElectraForPreTraining": real_if_labelled,
        "ElectraForCausalLM": labelled_next,
        "ElectraForSequenceClassification": first_row,
        "ElectraForMultipleChoice": summary_row,
        "ElectraForTokenClassification": labelled_tokens,
        "ElectraForQuestionAnswering": all_rows,
    },
)
