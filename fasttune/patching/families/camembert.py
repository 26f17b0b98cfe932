"""CamemBERT."""

from transformers.models.camembert import modeling_camembert as stock

from fasttune.patching.families import _bert_like, _roberta_like


class CamembertEmbeddings(_roberta_like.SumNormDropout, stock.CamembertEmbeddings): ...


class CamembertLayer(_bert_like.PromisedLayer, stock.CamembertLayer): ...


class CamembertSelfAttention(_bert_like.SelfAttention, stock.CamembertSelfAttention): ...


class CamembertCrossAttention(_bert_like.CrossAttention, stock.CamembertCrossAttention): ...


class CamembertSelfOutput(_bert_like.DenseDropoutAddNorm, stock.CamembertSelfOutput): ...


class CamembertOutput(_bert_like.DenseDropoutAddNorm, stock.CamembertOutput): ...


class CamembertIntermediate(_bert_like.DenseActivation, stock.CamembertIntermediate): ...


class CamembertLMHead(_roberta_like.LMHead, stock.CamembertLMHead): ...


FAMILY = _roberta_like.roberta_like("camembert", stock, globals(), prefix="Camembert")
