"""ELECTRA: generator and discriminator."""

from transformers.models.electra import modeling_electra as stock

from fasttune.patching.families import _bert_like as shared
from fasttune.patching.layers.mlp import why_no_gelu


class ElectraEmbeddings(shared.SumNormDropout, stock.ElectraEmbeddings): ...


class ElectraLayer(shared.PromisedLayer, stock.ElectraLayer): ...


class ElectraSelfAttention(shared.SelfAttention, stock.ElectraSelfAttention): ...


class ElectraCrossAttention(shared.CrossAttention, stock.ElectraCrossAttention): ...


class ElectraSelfOutput(shared.DenseDropoutAddNorm, stock.ElectraSelfOutput): ...


class ElectraOutput(shared.DenseDropoutAddNorm, stock.ElectraOutput): ...


class ElectraIntermediate(shared.DenseActivation, stock.ElectraIntermediate): ...


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
    pooled=("ElectraModel", "ElectraForSequenceClassification", "ElectraForMultipleChoice"),
    of_every_token=(
        "ElectraForMaskedLM",
        "ElectraForPreTraining",
        "ElectraForCausalLM",
        "ElectraForTokenClassification",
        "ElectraForQuestionAnswering",
    ),
)
