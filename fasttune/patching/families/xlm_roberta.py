"""XLM-RoBERTa."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as stock

from fasttune.patching.families import _bert_like, _roberta_like


class XLMRobertaEmbeddings(_roberta_like.SumNormDropout, stock.XLMRobertaEmbeddings): ...


class XLMRobertaLayer(_bert_like.PromisedLayer, stock.XLMRobertaLayer): ...


class XLMRobertaSelfAttention(_bert_like.SelfAttention, stock.XLMRobertaSelfAttention): ...


class XLMRobertaCrossAttention(_bert_like.CrossAttention, stock.XLMRobertaCrossAttention): ...


class XLMRobertaSelfOutput(_bert_like.DenseDropoutAddNorm, stock.XLMRobertaSelfOutput): ...


class XLMRobertaOutput(_bert_like.DenseDropoutAddNorm, stock.XLMRobertaOutput): ...


class XLMRobertaIntermediate(_bert_like.DenseActivation, stock.XLMRobertaIntermediate): ...


class XLMRobertaLMHead(_roberta_like.LMHead, stock.XLMRobertaLMHead): ...


FAMILY = _roberta_like.roberta_like("xlm_roberta", stock, globals(), prefix="XLMRoberta")
