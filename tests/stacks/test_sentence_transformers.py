"""sentence-transformers: embedding models, rerankers, sparse and multi-vector encoders, their losses and trainers."""

import copy
from functools import cache

import pytest
import torch
from model_parity import note_errors, settle
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, BertTokenizerFast

import fasttune

st = pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder  # noqa: E402
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer  # noqa: E402
from sentence_transformers.cross_encoder import losses as cross_losses  # noqa: E402
from sentence_transformers.multi_vector_encoder import losses as multi_losses  # noqa: E402
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402
from sentence_transformers.sparse_encoder import losses as sparse_losses  # noqa: E402
from sentence_transformers.sparse_encoder.modules import SpladePooling  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

WORDS = [f"w{number}" for number in range(92)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ANCHORS = ["w1 w2 w3", "w4 w5 w6 w7", "w8", "w9 w10"]
POSITIVES = ["w11 w12 w13 w14 w15 w16 w17", "w18 w19", "w20 w21 w22 w23 w24", "w25"]
NEGATIVES = ["w30 w31", "w32 w33 w34", "w35", "w36 w37 w38 w39 w40 w41"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models of tiny size with a tokenizer of made-up words, by architecture."""

    @cache
    def made(architecture, dropout=0.0, labels=1):
        where = tmp_path_factory.mktemp(architecture.__name__)
        (where / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=40,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=labels,
        )
        model = architecture(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(where)
        BertTokenizerFast(str(where / "vocab.txt"), model_max_length=40).save_pretrained(where)
        return str(where)

    return made


def embedder(path, pooling="mean", *more):
    transformer = Transformer(path, model_kwargs={"attn_implementation": "eager"})
    pooled = Pooling(transformer.get_embedding_dimension(), pooling)
    return SentenceTransformer(modules=[transformer, pooled, *more], device="cpu").train()


def gradients(model, loss):
    """loss(model): a number or a dict of parts."""
    model.zero_grad(set_to_none=True)
    found = loss(model)
    found = sum(found.values()) if isinstance(found, dict) else found
    found.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": found.detach()} | grads


def with_sdpa(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("sdpa")
    return model


def check(model, loss):
    """Loss and gradients of several draws against float64, by stock's own error; returns the last patched model."""
    patched = []

    def draw(errors, seed):
        drawn = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in drawn.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        exact = gradients(copy.deepcopy(drawn).double(), loss)
        stock, again = gradients(copy.deepcopy(drawn), loss), gradients(with_sdpa(drawn), loss)
        patched.append(fasttune.patch(drawn))
        note_errors(errors, gradients(drawn, loss), (stock, again), exact)

    settle(draw)
    return patched[-1]


def features(model, *columns):
    return [dict(model.preprocess(column)) for column in columns]


def counts(model):
    """Calls by the report's rows in parentheses."""
    found = {}
    for row in fasttune.report(model).rows:
        if row.modules.startswith("("):
            found[row.modules] = found.get(row.modules, 0) + row.calls
    return found


def assert_fast(model):
    """Padding was left out, the last layer computed for what was read, and no tensor in full."""
    found = counts(model)
    assert found["(packing)"] > 0
    assert "(reads)" not in found, str(fasttune.report(model))


def of_columns(make, columns, labels=None):
    """A loss of the embeddings of texts in columns."""

    def loss(model):
        dtype = next(model.parameters()).dtype
        given = labels.to(dtype) if labels is not None and labels.is_floating_point() else labels
        return make(model)(features(model, *columns), given)

    return loss


PAIRS, TRIPLES = (ANCHORS, POSITIVES), (ANCHORS, POSITIVES, NEGATIVES)
SCORES = torch.tensor([0.9, 0.1, 0.6, 0.3])


def in_all_directions(model):
    ways = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    return losses.MultipleNegativesRankingLoss(
        model,
        directions=ways,
        partition_mode="joint",
        hardness_mode="in_batch_negatives",
        hardness_strength=5.0,
    )


LOSSES = {
    "MultipleNegativesRanking": of_columns(losses.MultipleNegativesRankingLoss, TRIPLES),
    "MultipleNegativesRanking, all directions": of_columns(in_all_directions, TRIPLES),
    "MultipleNegativesSymmetricRanking": of_columns(losses.MultipleNegativesSymmetricRankingLoss, PAIRS),
    "CachedMultipleNegativesRanking": of_columns(
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), TRIPLES
    ),
    "GISTEmbed": of_columns(lambda model: losses.GISTEmbedLoss(model, guide=guide_of(model)), TRIPLES),
    "CachedGISTEmbed": of_columns(
        lambda model: losses.CachedGISTEmbedLoss(model, guide=guide_of(model), mini_batch_size=3), TRIPLES
    ),
    "CoSENT": of_columns(losses.CoSENTLoss, PAIRS, SCORES),
    "AnglE": of_columns(losses.AnglELoss, PAIRS, SCORES),
    "CosineSimilarity": of_columns(losses.CosineSimilarityLoss, PAIRS, SCORES),
    "Contrastive": of_columns(losses.ContrastiveLoss, PAIRS, torch.tensor([1, 0, 1, 0])),
    "Triplet": of_columns(losses.TripletLoss, TRIPLES),
    "MarginMSE": of_columns(losses.MarginMSELoss, TRIPLES, SCORES),
    "DistillKLDiv": of_columns(losses.DistillKLDivLoss, TRIPLES, torch.stack((SCORES, SCORES.flip(0)), 1)),
    "MSE": of_columns(losses.MSELoss, (ANCHORS,), torch.linspace(-1, 1, 128).view(4, 32)),
    "BatchAllTriplet": of_columns(losses.BatchAllTripletLoss, (POSITIVES,), torch.tensor([0, 0, 1, 1])),
    "Matryoshka": of_columns(
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16, 8]), PAIRS
    ),
}


def guide_of(model):
    """Frozen, of the same dtype, not patched."""
    guide = fasttune.unpatch(copy.deepcopy(model)) if is_patched(model) else copy.deepcopy(model)
    return guide.eval().requires_grad_(False)


def is_patched(model):
    return any("_fasttune" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_embeddings(folder, name):
    model = check(embedder(folder(BertModel)), LOSSES[name])
    if "Cached" not in name:  # there a chunk is a single text, without padding: a mask of ones reads all of it
        assert_fast(model)


@pytest.mark.parametrize(
    "pooling",
    [
        "mean",
        "cls",
        "max",
        "weightedmean",
        "lasttoken",
        "mean_sqrt_len_tokens",
        ("cls", "mean", "max"),
        ("max", "lasttoken"),
    ],
    ids=str,
)
def test_poolings(folder, pooling):
    modes = 1 if isinstance(pooling, str) else len(pooling)
    model = embedder(folder(BertModel), pooling, Dense(32 * modes, 16), Normalize())
    assert_fast(check(model, LOSSES["MultipleNegativesRanking"]))


def test_a_prompt_is_left_out_of_the_pooling(folder):
    model = embedder(folder(BertModel))
    model[1].include_prompt = False

    def loss(model):
        columns = [dict(model.preprocess(column, prompt="w50 w51 ")) for column in PAIRS]
        assert all("prompt_length" in column for column in columns)
        return losses.MultipleNegativesRankingLoss(model)(columns, None)

    assert_fast(check(model, loss))


def test_adaptive_layers_read_each_layer(folder):
    """Which layers are left out is drawn from Python's generator."""
    import random

    def loss(model):
        random.seed(0)
        inner = losses.MultipleNegativesRankingLoss(model)
        return losses.AdaptiveLayerLoss(model, inner, n_layers_per_step=-1)(features(model, *PAIRS), None)

    check(embedder(folder(BertModel)), loss)


def test_a_denoising_decoder_with_cross_attention(folder):
    path = folder(BertModel)

    def loss(model):
        torch.manual_seed(3)  # the decoder is made anew
        made = losses.DenoisingAutoEncoderLoss(model, decoder_name_or_path=path, tie_encoder_decoder=False)
        made.decoder.to(next(model.parameters()).dtype).eval()
        if is_patched(model):
            fasttune.patch(made.decoder)
        return made(features(model, ANCHORS, POSITIVES), None)

    check(embedder(path, "cls"), loss)


def test_contrastive_tension_of_two_models(folder):
    def loss(model):
        return losses.ContrastiveTensionLoss(model)(features(model, ANCHORS, POSITIVES), torch.tensor([1, 0, 1, 0]))

    check(embedder(folder(BertModel)), loss)


@pytest.mark.parametrize("shared", [False, True])
def test_a_router(folder, shared):
    """Queries and documents through encoders of their own, or through one with poolings of their own."""
    first = Transformer(folder(BertModel), model_kwargs={"attn_implementation": "eager"})
    second = first if shared else copy.deepcopy(first)
    router = Router.for_query_document(
        query_modules=[first, Pooling(32, "cls")], document_modules=[second, Pooling(32, "mean")]
    )
    model = SentenceTransformer(modules=[router], device="cpu").train()

    def loss(model):
        tasks = ("query", "document", "document")
        columns = [
            dict(model.preprocess(c, task=task)) | {"task": task} for c, task in zip(TRIPLES, tasks, strict=True)
        ]
        return losses.MultipleNegativesRankingLoss(model)(columns, None)

    assert_fast(check(model, loss))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("kind", ["embedder", "sparse"])
@pytest.mark.parametrize("unused", [False, True])
def test_ddp(folder, one_process, unused, kind):
    """As the trainer wraps models; it lets DDP look for unused parameters."""
    wrapped = []

    def loss(model):
        wrapped.append(torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused))
        return (wrapped[-1](features(model, ANCHORS)[0])["sentence_embedding"] ** 2).sum()

    model = embedder(folder(BertModel), "cls") if kind == "embedder" else sparse(folder(BertForMaskedLM))
    if not unused:  # the pooler's weights, which nobody uses, would be waited for
        for parameter in [p for name, p in model.named_parameters() if ".pooler." in name]:
            parameter.requires_grad_(False)
    ours = check(model, loss)
    assert_fast(ours)
    assert kind == "sparse" or counts(ours)["(trim)"] > 0


@pytest.mark.parametrize(
    "name", ["BinaryCrossEntropy", "CrossEntropy", "MultipleNegativesRanking", "ListNet", "MarginMSE"]
)
def test_rerankers(folder, name):
    labels = 3 if name == "CrossEntropy" else 1
    path = folder(BertForSequenceClassification, labels=labels)
    model = CrossEncoder(path, num_labels=labels, device="cpu", model_kwargs={"attn_implementation": "eager"}).train()

    def loss(model):
        dtype = next(model.parameters()).dtype
        made = getattr(cross_losses, f"{name}Loss")(model)
        if name == "BinaryCrossEntropy":
            return made([ANCHORS, POSITIVES], SCORES.to(dtype))
        if name == "CrossEntropy":
            return made([ANCHORS, POSITIVES], torch.tensor([0, 2, 1, 1]))
        if name == "MarginMSE":
            return made([ANCHORS, POSITIVES, NEGATIVES], SCORES.to(dtype))
        if name == "ListNet":
            lists = [POSITIVES[:2], NEGATIVES[:3]]
            return made([ANCHORS[:2], lists], [SCORES[:2].to(dtype), SCORES[:3].to(dtype)])
        torch.manual_seed(1)  # negatives are drawn
        return made([ANCHORS, POSITIVES], None)

    ours = check(model, loss)
    assert_fast(ours)
    assert counts(ours)["(trim)"] > 0


def sparse(path, pooling="max", activation="relu", chunk=None):
    transformer = Transformer(path, transformer_task="fill-mask", model_kwargs={"attn_implementation": "eager"})
    pooled = SpladePooling(pooling, activation_function=activation, chunk_size=chunk)
    return SparseEncoder(modules=[transformer, pooled], device="cpu").train()


@pytest.mark.parametrize("options", [{}, {"activation": "log1p_relu"}, {"chunk": 4}, {"pooling": "sum"}], ids=str)
def test_sparse_encoders(folder, options, monkeypatch):
    rows, stock = [], fasttune.ops.linear_max

    def counting(input, *args, **kwargs):
        rows.append(input.shape[0])
        return stock(input, *args, **kwargs)

    monkeypatch.setattr(fasttune.ops, "linear_max", counting)

    def loss(model):
        inner = sparse_losses.SparseMultipleNegativesRankingLoss(model)
        made = sparse_losses.SpladeLoss(model, inner, document_regularizer_weight=0.05, query_regularizer_weight=0.03)
        return made(features(model, *TRIPLES), None)

    model = check(sparse(folder(BertForMaskedLM), **options), loss)
    tokens = sum(int(column["attention_mask"].sum()) for column in features(model, *TRIPLES))
    rows.clear()
    gradients(model, loss)
    assert sum(rows) == (0 if options.get("pooling") == "sum" else tokens)
    assert_fast(model)


def test_a_cached_sparse_loss(folder):
    def loss(model):
        inner = sparse_losses.SparseMultipleNegativesRankingLoss(model)
        return sparse_losses.CachedSpladeLoss(model, inner, 0.05, query_regularizer_weight=0.03, mini_batch_size=3)(
            features(model, *PAIRS), None
        )

    check(sparse(folder(BertForMaskedLM)), loss)


@pytest.mark.parametrize("cached", [False, True])
def test_late_interaction(folder, cached):
    transformer = Transformer(folder(BertModel), model_kwargs={"attn_implementation": "eager"})
    modules = [transformer, Dense(32, 16, module_input_name="token_embeddings", module_output_name="token_embeddings")]
    model = MultiVectorEncoder(modules=[*modules, MultiVectorMask()], device="cpu").train()
    name = f"{'Cached' if cached else ''}MultiVectorMultipleNegativesRankingLoss"
    more = {"mini_batch_size": 3} if cached else {}

    def loss(model):
        return getattr(multi_losses, name)(model, **more)(features(model, *PAIRS), None)

    check(model, loss)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_caching_replays_the_dropout(folder, autocast):
    """The cached loss in chunks of all is the loss itself, if both runs of each chunk drop the same."""
    model = fasttune.patch(embedder(folder(BertModel, dropout=0.2)))

    def run(loss):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return gradients(model, lambda model: loss(features(model, *PAIRS), None))

    plain = run(losses.MultipleNegativesRankingLoss(model))
    cached = run(losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4))
    other = run(losses.MultipleNegativesRankingLoss(model))
    for name, expected in plain.items():
        torch.testing.assert_close(other[name], expected, rtol=0, atol=0)
        scale = expected.abs().max().item()
        bound = (4e-2 if autocast else 1e-5) * scale + 1e-7
        torch.testing.assert_close(cached[name], expected, rtol=0, atol=bound)


ENCODINGS = [{}, {"convert_to_tensor": True, "normalize_embeddings": True}, {"output_value": "token_embeddings"}]


def test_encode_and_predict_are_stocks(folder):
    texts = [*ANCHORS, *POSITIVES, *NEGATIVES]
    stock = embedder(folder(BertModel), ("mean", "cls", "max")).eval()
    ours = fasttune.patch(copy.deepcopy(stock))
    for options in (
        {},
        {"convert_to_tensor": True, "normalize_embeddings": True},
        {"output_value": "token_embeddings"},
    ):
        expected, found = (
            model.encode(texts, batch_size=5, show_progress_bar=False, **options) for model in (stock, ours)
        )
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(torch.as_tensor(b), torch.as_tensor(a), rtol=1e-4, atol=1e-5)
    assert counts(ours)["(packing)"] > 0
    reranker = CrossEncoder(folder(BertForSequenceClassification), num_labels=1, device="cpu")
    pairs = list(zip(ANCHORS, POSITIVES, strict=True))
    expected = reranker.predict(pairs)
    torch.testing.assert_close(
        torch.as_tensor(fasttune.patch(reranker).predict(pairs)), torch.as_tensor(expected), rtol=1e-4, atol=1e-5
    )
    sparse_model = sparse(folder(BertForMaskedLM)).eval()
    expected = sparse_model.encode(texts, convert_to_tensor=True).to_dense()
    found = fasttune.patch(sparse_model).encode(texts, convert_to_tensor=True).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_trainer_saves_what_stock_saves(folder, when, tmp_path):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    data = datasets.Dataset.from_dict({"anchor": ANCHORS * 2, "positive": POSITIVES * 2})

    def trained(patch):
        model = embedder(folder(BertModel))
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / f"run{patch}"),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        if patch == "before":
            fasttune.patch(model)
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
        if patch == "after":
            fasttune.patch(model)
        trainer.train()
        model.save(str(tmp_path / f"saved{patch}"))
        return model

    expected, found = trained(None), trained(when)
    assert_fast(found)
    loaded = SentenceTransformer(str(tmp_path / f"saved{when}"), device="cpu")
    for (name, a), b in zip(expected.state_dict().items(), loaded.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-4, msg=name)


def test_adapters(folder):
    peft = pytest.importorskip("peft")
    model = embedder(folder(BertModel))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    assert_fast(check(model, LOSSES["MultipleNegativesRanking"]))
