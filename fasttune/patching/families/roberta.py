"""RoBERTa."""

from transformers.models.roberta import modeling_roberta as stock

from fasttune.patching.families import _bert_like, _roberta_like


class RobertaEmbeddings(_roberta_like.SumNormDropout, stock.RobertaEmbeddings): ...


class RobertaLayer(_bert_like.PromisedLayer, stock.RobertaLayer): ...


class RobertaSelfAttention(_bert_like.SelfAttention, stock.RobertaSelfAttention): ...


class RobertaCrossAttention(_bert_like.CrossAttention, stock.RobertaCrossAttention): ...


class RobertaSelfOutput(_bert_like.DenseDropoutAddNorm, stock.RobertaSelfOutput): ...


class RobertaOutput(_bert_like.DenseDropoutAddNorm, stock.RobertaOutput): ...


class RobertaIntermediate(_bert_like.DenseActivation, stock.RobertaIntermediate): ...


class RobertaLMHead(_roberta_like.LMHead, stock.RobertaLMHead): ...


FAMILY = _roberta_like.roberta_like("roberta", stock, globals(), prefix="Roberta")
