"""Well-known checkpoints whose class is one that `patch` knows: what their published config.json says, where it differs
from the defaults of the class in something that decides what runs. Checkpoints are left out where that is not certain.
`scripts/checkpoints_page.py` makes the table of docs/checkpoints.md of it."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig


@dataclass(frozen=True)
class Checkpoint:
    """name: on the hub. loaded_as: the Auto class that people load it with. config: beyond the class's defaults."""

    name: str
    model_type: str
    loaded_as: str
    config: dict[str, Any]

    def of_class(self, **changes):
        """Its configuration, as an object."""
        return AutoConfig.for_model(self.model_type, **{**self.config, **changes})


def _of(model_type, loaded_as, names, **config):
    return [Checkpoint(name, model_type, f"AutoModel{loaded_as}", config) for name in names.split()]


_LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
_MINILM = {"hidden_size": 384, "intermediate_size": 1536}  # 12 heads of 32
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_XLMR = _ROBERTA | {"vocab_size": 250002}
_MPNET = {"max_position_embeddings": 514, "layer_norm_eps": 1e-5}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_BERT = [
    *_of(
        "bert",
        "",
        "sentence-transformers/all-MiniLM-L6-v2 sentence-transformers/paraphrase-MiniLM-L6-v2"
        " sentence-transformers/multi-qa-MiniLM-L6-cos-v1 Snowflake/snowflake-arctic-embed-xs",
        num_hidden_layers=6,
        **_MINILM,
    ),
    *_of(
        "bert",
        "",
        "sentence-transformers/all-MiniLM-L12-v2 BAAI/bge-small-en-v1.5 intfloat/e5-small-v2 thenlper/gte-small"
        " Snowflake/snowflake-arctic-embed-s microsoft/MiniLM-L12-H384-uncased",
        **_MINILM,
    ),
    *_of(
        "bert",
        "",
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2 intfloat/multilingual-e5-small",
        vocab_size=250037,
        **_MINILM,
    ),
    *_of(
        "bert",
        "",
        "BAAI/bge-base-en-v1.5 intfloat/e5-base-v2 thenlper/gte-base Snowflake/snowflake-arctic-embed-m"
        " facebook/contriever princeton-nlp/sup-simcse-bert-base-uncased colbert-ir/colbertv2.0",
    ),
    *_of(
        "bert",
        "",
        "BAAI/bge-large-en-v1.5 intfloat/e5-large-v2 thenlper/gte-large mixedbread-ai/mxbai-embed-large-v1"
        " Snowflake/snowflake-arctic-embed-l",
        **_LARGE,
    ),
    *_of("bert", "", "sentence-transformers/LaBSE", vocab_size=501153),
    *_of("bert", "ForSequenceClassification", "cross-encoder/ms-marco-MiniLM-L6-v2", num_hidden_layers=6, **_MINILM),
    *_of("bert", "ForSequenceClassification", "cross-encoder/ms-marco-MiniLM-L12-v2", **_MINILM),
    *_of(
        "bert",
        "ForSequenceClassification",
        "cross-encoder/ms-marco-TinyBERT-L2-v2",
        num_hidden_layers=2,
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=512,
    ),
    *_of("bert", "ForSequenceClassification", "ProsusAI/finbert"),
    *_of("bert", "ForSequenceClassification", "nlptown/bert-base-multilingual-uncased-sentiment", vocab_size=105879),
    *_of(
        "bert",
        "ForMaskedLM",
        "google/bert_uncased_L-2_H-128_A-2",
        num_hidden_layers=2,
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=512,
    ),
    *_of(
        "bert",
        "ForMaskedLM",
        "google-bert/bert-base-uncased naver/splade-v3 naver/splade-cocondenser-ensembledistil"
        " nlpaueb/legal-bert-base-uncased microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext",
    ),
    *_of(
        "bert",
        "ForMaskedLM",
        "google-bert/bert-base-cased dmis-lab/biobert-v1.1 emilyalsentzer/Bio_ClinicalBERT",
        vocab_size=28996,
    ),
    *_of("bert", "ForMaskedLM", "google-bert/bert-large-uncased", **_LARGE),
    *_of("bert", "ForMaskedLM", "google-bert/bert-large-cased", vocab_size=28996, **_LARGE),
    *_of("bert", "ForMaskedLM", "google-bert/bert-base-multilingual-cased", vocab_size=119547),
    *_of("bert", "ForMaskedLM", "allenai/scibert_scivocab_uncased", vocab_size=31090),
    *_of(
        "bert",
        "ForMaskedLM",
        "google-bert/bert-base-chinese hfl/chinese-roberta-wwm-ext hfl/chinese-macbert-base",
        vocab_size=21128,
    ),
    *_of("bert", "ForMaskedLM", "tohoku-nlp/bert-base-japanese-v3", vocab_size=32768),
    *_of("bert", "ForMaskedLM", "klue/bert-base", vocab_size=32000),
    *_of("bert", "ForMaskedLM", "dbmdz/bert-base-german-cased deepset/gbert-base", vocab_size=31102),
    *_of("bert", "ForMaskedLM", "neuralmind/bert-base-portuguese-cased", vocab_size=29794),
    *_of("bert", "ForMaskedLM", "aubmindlab/bert-base-arabertv02", vocab_size=64000),
    *_of("bert", "ForMaskedLM", "ai4bharat/IndicBERTv2-MLM-only", vocab_size=250000),
    *_of(
        "bert",
        "ForMaskedLM",
        "Rostlab/prot_bert",
        num_hidden_layers=30,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        vocab_size=30,
        max_position_embeddings=40000,
        **_NO_DROPOUT,
    ),
    *_of("bert", "ForTokenClassification", "dslim/bert-base-NER", vocab_size=28996),
    *_of(
        "bert",
        "ForQuestionAnswering",
        "google-bert/bert-large-uncased-whole-word-masking-finetuned-squad",
        **_LARGE,
    ),
]

_ROBERTAS = [
    *_of("roberta", "ForMaskedLM", "FacebookAI/roberta-base", **_ROBERTA),
    *_of("roberta", "ForMaskedLM", "FacebookAI/roberta-large", **_ROBERTA, **_LARGE),
    *_of("roberta", "ForMaskedLM", "distilbert/distilroberta-base", num_hidden_layers=6, **_ROBERTA),
    *_of("roberta", "", "sentence-transformers/all-distilroberta-v1", num_hidden_layers=6, **_ROBERTA),
    *_of("roberta", "", "microsoft/codebert-base microsoft/graphcodebert-base", **_ROBERTA),
    *_of(
        "roberta",
        "",
        "microsoft/unixcoder-base",
        **_ROBERTA | {"vocab_size": 51416, "max_position_embeddings": 1026, "type_vocab_size": 10},
    ),
    *_of("roberta", "ForSequenceClassification", "FacebookAI/roberta-large-mnli", **_ROBERTA, **_LARGE),
    *_of("roberta", "ForSequenceClassification", "cardiffnlp/twitter-roberta-base-sentiment-latest", **_ROBERTA),
    *_of("roberta", "ForQuestionAnswering", "deepset/roberta-base-squad2", **_ROBERTA),
    *_of(
        "roberta",
        "ForMaskedLM",
        "vinai/bertweet-base",
        **_ROBERTA | {"vocab_size": 64001, "max_position_embeddings": 130},
    ),
    *_of(
        "roberta",
        "ForMaskedLM",
        "vinai/phobert-base vinai/phobert-base-v2",
        **_ROBERTA | {"vocab_size": 64001, "max_position_embeddings": 258},
    ),
    *_of("roberta", "ForMaskedLM", "klue/roberta-base", vocab_size=32000, **_ROBERTA),
    *_of("roberta", "ForMaskedLM", "klue/roberta-large", vocab_size=32000, **_ROBERTA, **_LARGE),
]

_XLM_ROBERTAS = [
    *_of("xlm-roberta", "ForMaskedLM", "FacebookAI/xlm-roberta-base cardiffnlp/twitter-xlm-roberta-base", **_XLMR),
    *_of("xlm-roberta", "ForMaskedLM", "FacebookAI/xlm-roberta-large", **_XLMR, **_LARGE),
    *_of(
        "xlm-roberta",
        "",
        "intfloat/multilingual-e5-base sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
        **_XLMR,
    ),
    *_of("xlm-roberta", "", "intfloat/multilingual-e5-large", **_XLMR, **_LARGE),
    *_of(
        "xlm-roberta",
        "",
        "BAAI/bge-m3 Snowflake/snowflake-arctic-embed-l-v2.0",
        **_XLMR | {"max_position_embeddings": 8194},
        **_LARGE,
    ),
    *_of("xlm-roberta", "ForSequenceClassification", "BAAI/bge-reranker-base", **_XLMR),
    *_of("xlm-roberta", "ForSequenceClassification", "BAAI/bge-reranker-large", **_XLMR, **_LARGE),
    *_of(
        "xlm-roberta",
        "ForSequenceClassification",
        "BAAI/bge-reranker-v2-m3",
        **_XLMR | {"max_position_embeddings": 8194},
        **_LARGE,
    ),
    *_of(
        "xlm-roberta",
        "ForTokenClassification",
        "FacebookAI/xlm-roberta-large-finetuned-conll03-english",
        **_XLMR,
        **_LARGE,
    ),
]

_CAMEMBERTS = [
    *_of("camembert", "ForMaskedLM", "almanach/camembert-base", vocab_size=32005, **_ROBERTA),
    *_of("camembert", "ForMaskedLM", "almanach/camembert-large", vocab_size=32005, **_ROBERTA, **_LARGE),
]

_ELECTRAS = [
    *_of("electra", "ForPreTraining", "google/electra-small-discriminator"),
    *_of(
        "electra",
        "ForPreTraining",
        "google/electra-base-discriminator",
        embedding_size=768,
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=3072,
    ),
    *_of("electra", "ForPreTraining", "google/electra-large-discriminator", embedding_size=1024, **_LARGE),
    *_of("electra", "ForMaskedLM", "google/electra-small-generator"),
    *_of("electra", "ForMaskedLM", "google/electra-base-generator", embedding_size=768),
    *_of("electra", "ForMaskedLM", "google/electra-large-generator", embedding_size=1024, num_hidden_layers=24),
]

_DISTILBERTS = [
    *_of(
        "distilbert",
        "",
        "sentence-transformers/multi-qa-distilbert-cos-v1 sentence-transformers/msmarco-distilbert-base-v4",
    ),
    *_of("distilbert", "ForMaskedLM", "distilbert/distilbert-base-uncased naver/splade-v3-distilbert"),
    *_of("distilbert", "ForMaskedLM", "distilbert/distilbert-base-cased", vocab_size=28996),
    *_of("distilbert", "ForMaskedLM", "distilbert/distilbert-base-multilingual-cased", vocab_size=119547),
    *_of("distilbert", "ForSequenceClassification", "distilbert/distilbert-base-uncased-finetuned-sst-2-english"),
    *_of("distilbert", "ForQuestionAnswering", "distilbert/distilbert-base-uncased-distilled-squad"),
    *_of("distilbert", "ForQuestionAnswering", "distilbert/distilbert-base-cased-distilled-squad", vocab_size=28996),
]

_MPNETS = [
    *_of("mpnet", "ForMaskedLM", "microsoft/mpnet-base", **_MPNET),
    *_of(
        "mpnet",
        "",
        "sentence-transformers/all-mpnet-base-v1 sentence-transformers/all-mpnet-base-v2"
        " sentence-transformers/multi-qa-mpnet-base-dot-v1 sentence-transformers/multi-qa-mpnet-base-cos-v1"
        " sentence-transformers/paraphrase-mpnet-base-v2 sentence-transformers/nli-mpnet-base-v2"
        " sentence-transformers/stsb-mpnet-base-v2",
        **_MPNET,
    ),
]

_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}
_V3_BASE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_V3_SMALL = _V3_BASE | {"num_hidden_layers": 6}
_V3_XSMALL = {"num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_M_V3 = _V3_BASE | {"vocab_size": 251000}
_CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}


def _deberta(loaded_as, names, **config):
    return _of("deberta-v2", loaded_as, names, **_DEBERTA | config)


_DEBERTAS = [
    *_deberta("", "microsoft/deberta-v3-xsmall", **_V3_XSMALL),
    *_deberta("", "microsoft/deberta-v3-small", **_V3_SMALL),
    *_deberta("", "microsoft/deberta-v3-base", **_V3_BASE),
    *_deberta("", "microsoft/deberta-v3-large", **_LARGE),
    *_deberta("", "microsoft/mdeberta-v3-base", **_M_V3),
    *_deberta(
        "ForSequenceClassification",
        "cross-encoder/nli-deberta-v3-xsmall mixedbread-ai/mxbai-rerank-xsmall-v1",
        **_V3_XSMALL,
    ),
    *_deberta("ForSequenceClassification", "cross-encoder/nli-deberta-v3-small", **_V3_SMALL),
    *_deberta(
        "ForSequenceClassification",
        "cross-encoder/nli-deberta-v3-base mixedbread-ai/mxbai-rerank-base-v1"
        " MoritzLaurer/DeBERTa-v3-base-mnli-fever-anli MoritzLaurer/deberta-v3-base-zeroshot-v2.0",
        **_V3_BASE,
    ),
    *_deberta(
        "ForSequenceClassification",
        "cross-encoder/nli-deberta-v3-large mixedbread-ai/mxbai-rerank-large-v1"
        " MoritzLaurer/DeBERTa-v3-large-mnli-fever-anli-ling-wanli MoritzLaurer/deberta-v3-large-zeroshot-v2.0"
        " OpenAssistant/reward-model-deberta-v3-large-v2",
        **_LARGE,
    ),
    *_deberta("ForSequenceClassification", "MoritzLaurer/mDeBERTa-v3-base-mnli-xnli", **_M_V3),
    *_deberta("ForQuestionAnswering", "deepset/deberta-v3-base-squad2", **_V3_BASE),
    *_deberta("ForQuestionAnswering", "deepset/deberta-v3-large-squad2", **_LARGE),
    # 24 layers of 1536 are the class's defaults.
    *_deberta("ForMaskedLM", "microsoft/deberta-v2-xlarge", **_CONVOLUTION),
    *_deberta("ForMaskedLM", "microsoft/deberta-v2-xxlarge", num_hidden_layers=48, **_CONVOLUTION),
    *_deberta("ForSequenceClassification", "microsoft/deberta-v2-xlarge-mnli", **_CONVOLUTION),
    *_deberta("ForSequenceClassification", "microsoft/deberta-v2-xxlarge-mnli", num_hidden_layers=48, **_CONVOLUTION),
]

# The second version's activation (GELU by tanh) and dropout (none) are the defaults of the class.
_ALBERTS = [
    *_of(
        "albert",
        "ForMaskedLM",
        "albert/albert-base-v1",
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    ),
    *_of(
        "albert",
        "ForMaskedLM",
        "albert/albert-base-v2",
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=3072,
    ),
    *_of("albert", "ForMaskedLM", "albert/albert-large-v2", **_LARGE),
    *_of(
        "albert",
        "ForMaskedLM",
        "albert/albert-xlarge-v2",
        num_hidden_layers=24,
        hidden_size=2048,
        num_attention_heads=16,
        intermediate_size=8192,
    ),
    *_of("albert", "ForMaskedLM", "albert/albert-xxlarge-v2"),
]


def _ettin(name, layers, width, heads, middle):
    return _of(
        "modernbert",
        "ForMaskedLM",
        f"jhu-clsp/ettin-encoder-{name}",
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=middle,
    )


_MODERNBERTS = [
    *_of("modernbert", "ForMaskedLM", "answerdotai/ModernBERT-base"),
    *_of(
        "modernbert",
        "ForMaskedLM",
        "answerdotai/ModernBERT-large",
        num_hidden_layers=28,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=2624,
    ),
    *_of("modernbert", "", "Alibaba-NLP/gte-modernbert-base nomic-ai/modernbert-embed-base"),
    *_of("modernbert", "", "lightonai/GTE-ModernColBERT-v1", vocab_size=50370),
    *_ettin("17m", 7, 256, 4, 384),
    *_ettin("32m", 10, 384, 6, 576),
    *_ettin("68m", 19, 512, 8, 768),
    *_ettin("150m", 22, 768, 12, 1152),
    *_ettin("400m", 28, 1024, 16, 2624),
    *_ettin("1b", 28, 1792, 28, 3840),
    *_of("modernbert", "ForMaskedLM", "jhu-clsp/mmBERT-base", vocab_size=256000, pad_token_id=0),
    *_of(
        "modernbert",
        "ForMaskedLM",
        "jhu-clsp/mmBERT-small",
        vocab_size=256000,
        pad_token_id=0,
        hidden_size=384,
        num_attention_heads=6,
    ),
]


def _esm(name, layers, width, heads, **config):
    shared = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "layer_norm_eps": 1e-5,
        "token_dropout": True,
        **_NO_DROPOUT,
    }
    return _of("esm", "ForMaskedLM", f"facebook/{name}", **shared | config)


_ESMS = [
    *_esm("esm1b_t33_650M_UR50S", 33, 1280, 20, emb_layer_norm_before=True),
    *(
        checkpoint
        for name, layers, width, heads in (
            ("t6_8M", 6, 320, 20),
            ("t12_35M", 12, 480, 20),
            ("t30_150M", 30, 640, 20),
            ("t33_650M", 33, 1280, 20),
            ("t36_3B", 36, 2560, 40),
            ("t48_15B", 48, 5120, 40),
        )
        for checkpoint in _esm(
            f"esm2_{name}_UR50D", layers, width, heads, position_embedding_type="rotary", emb_layer_norm_before=False
        )
    ),
]


def _cerebras(name, layers, width, heads):
    return _of(
        "gpt2",
        "ForCausalLM",
        f"cerebras/Cerebras-GPT-{name}",
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_inner=4 * width,
        n_positions=2048,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


_MEDIUM, _WIDER = {"n_layer": 24, "n_embd": 1024, "n_head": 16}, {"n_layer": 36, "n_embd": 1280, "n_head": 20}
_GPT2S = [
    *_of("gpt2", "ForCausalLM", "openai-community/gpt2 microsoft/DialoGPT-small"),
    *_of("gpt2", "ForCausalLM", "openai-community/gpt2-medium microsoft/DialoGPT-medium", **_MEDIUM),
    *_of("gpt2", "ForCausalLM", "openai-community/gpt2-large microsoft/DialoGPT-large nferruz/ProtGPT2", **_WIDER),
    *_of("gpt2", "ForCausalLM", "openai-community/gpt2-xl", n_layer=48, n_embd=1600, n_head=25),
    *_of("gpt2", "ForCausalLM", "distilbert/distilgpt2", n_layer=6),
    *_of("gpt2", "ForCausalLM", "uer/gpt2-chinese-cluecorpussmall", vocab_size=21128),
    *_cerebras("111M", 10, 768, 12),
    *_cerebras("256M", 14, 1088, 17),
    *_cerebras("590M", 18, 1536, 12),
    *_cerebras("1.3B", 24, 2048, 16),
    *_cerebras("2.7B", 32, 2560, 32),
]

CHECKPOINTS = [
    *_BERT,
    *_ROBERTAS,
    *_XLM_ROBERTAS,
    *_CAMEMBERTS,
    *_ELECTRAS,
    *_DISTILBERTS,
    *_MPNETS,
    *_DEBERTAS,
    *_ALBERTS,
    *_MODERNBERTS,
    *_ESMS,
    *_GPT2S,
]
