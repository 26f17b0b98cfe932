"""The tests of the operations can fail: with a bug seeded in a C++ kernel, the named one does.

Each bug is one textual change of one source. Only the translation unit that holds it is compiled anew, for one
instruction set, at -O1; the tests then run on the library linked from it. Everything lands in build/seeded_bugs.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fasttune.ops import _cpp

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "seeded_bugs"
COMPILER = os.environ.get("CXX", "g++")
ISA = "avx2" if _cpp.library is not None and "avx2" in _cpp.library.available_isas() else "baseline"
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -w"

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} was not found")


@dataclasses.dataclass
class Bug:
    name: str
    unit: str  # of csrc/cpu, without .cpp
    right: str
    wrong: str
    test: str  # of tests/ops/test_<file>.py::<test>
    source: str = ""  # where the change is, if not in the unit itself


# fmt: off
BUGS = [
    Bug("a hidden key counts in the tail of a vector", "attention_forward",
        "if (visible < vectors * kLanes) {",
        "if (visible + 1 < vectors * kLanes) {", "attention::test_lengths"),
    Bug("the log-sum-exp lacks the maximum", "attention_forward",
        "s.reference[row] + std::log(total)",
        "std::log(total)", "attention::test_lengths"),
    Bug("the sum is not rescaled when the maximum rises", "attention_forward",
        "    total = total * shrink;\n",
        "", "attention::test_large_scores_neither_overflow_nor_lose_the_softmax"),
    Bug("kept weights are not scaled", "attention_forward",
        "args.dropout.scale / total",
        "1.0f / total", "attention::test_dropout_matches_the_reference"),
    Bug("the gradient of a kept weight is not scaled", "attention_backward",
        "keep(kept, dweight * scale)",
        "keep(kept, dweight)", "attention::test_dropout_matches_the_reference"),
    Bug("dQ lacks the scale of the scores", "attention_backward",
        "rows, args.head_dim, args.scale,",
        "rows, args.head_dim, 1.0f,", "attention::test_scale"),
    Bug("dQ keeps the last segment of keys alone", "attention_backward",
        "load(partial + i) + load(own + i)",
        "load(own + i)", "attention::test_lengths"),
    Bug("delta lacks the columns behind the last whole vector", "attention_backward",
        "if (d < head_dim) delta",
        "if (d > head_dim) delta", "attention::test_matches_stock"),
    Bug("positions of chosen queries are taken for the first ones", "attention_backward",
        "sequence.positions ? sequence.positions[query] : query",
        "sequence.positions ? query : query",
        "attention_chosen_queries::test_rows_have_the_bits_that_they_have_among_all", "attention.h"),
    Bug("a window has one key more before the query", "attention_forward",
        "{keys, place - behind,",
        "{keys, place - behind - 1,", "attention_window::test_matches_stock", "simd/attention.inc"),
    Bug("the gradient counts a key before the window", "attention_backward",
        "select(lanes_below(from, column + v * kLanes), zero(), seen_weight)",
        "seen_weight", "attention_window::test_matches_stock"),
    Bug("a chosen query's window lacks the end of its keys", "attention_backward",
        "return {keys, -behind - first_key,",
        "return {keys, 1 - behind - first_key,",
        "attention_behind_keys::test_a_window_goes_by_position", "simd/attention.inc"),
    Bug("a bias stands one distance off", "attention_forward",
        "std::min(2 * reach, place - kAttentionBlock)",
        "std::min(2 * reach, place - kAttentionBlock + 1)",
        "attention_terms::test_matches_stock", "simd/attention_terms.inc"),
    Bug("the bias's gradient counts what lies beside the block", "attention_backward",
        "        if (column < 0) x = select(lanes_below(-column, 0), zero(), x);\n",
        "", "attention_terms::test_matches_stock", "simd/attention_terms.inc"),
    Bug("the bias's gradient is the last task's", "attention_backward",
        "to[i] += task.dbias[i]",
        "to[i] = task.dbias[i]", "attention_terms::test_matches_stock"),
    Bug("c2p is not scaled", "attention_forward",
        ": scale * load(to + c)",
        ": load(to + c)", "attention_terms::test_matches_stock", "simd/attention_terms.inc"),
    Bug("buckets that lie apart are fetched as neighbours", "attention_forward",
        "if (high[i] - low[i] >= kLanes) low[i] = -1;",
        "(void)high;", "attention_terms::test_any_map_of_distances_to_buckets", "simd/attention_terms.inc"),
    Bug("queries that stand apart are taken for neighbours", "attention_forward",
        "if (block.run(row, kLanes) == kLanes) {  // a key's",
        "if (block.place[0] < kLanes) {  // a key's",
        "attention_terms::test_chosen_queries_inside_before_and_behind", "simd/attention_terms.inc"),
    Bug("a key's distances are taken in the rows' order", "attention_backward",
        "const int64_t r = kLanes - 1 - i;",
        "const int64_t r = i;", "attention_terms::test_matches_stock", "simd/attention_terms.inc"),
    Bug("dc2p keeps the last segment of keys alone", "attention_backward",
        "    add(s.dc2p, s.bucket_ld, task.sequence.queries * ld);\n",
        "", "attention_terms::test_long_sequences_with_dropout"),
    Bug("who sees one key has a gradient of its bias", "attention_backward",
        "if (visible.sees_one(r))",
        "if (visible.sees_one(r) && args.terms.any())\n      continue;\n    else if (visible.sees_one(r))",
        "attention_terms::test_who_sees_one_key_passes_no_gradient_to_scores"),
    Bug("ignore_index is always -100", "cross_entropy",
        "if (label == args.ignore_index) {",
        "if (label == -100) {", "cross_entropy::test_another_ignore_index_may_be_a_class"),
    Bug("the sum of a block is not rescaled", "cross_entropy",
        "sum *= std::exp(static_cast<double>(largest) - block_largest);",
        "", "cross_entropy::test_matches_torch"),
    Bug("the label's gradient lacks its smoothing", "cross_entropy",
        "  at_label -= upstream * smoothing * (args.class_weight ? args.class_weight[label] : 1.0f);\n",
        "", "cross_entropy::test_matches_torch"),
    Bug("the bias gradient lacks the label's term", "cross_entropy",
        "  if (partial) partial[label] -= upstream * label_weight;\n",
        "", "linear_cross_entropy::test_matches_torch"),
    Bug("the entropy's sum does not follow the maximum", "log_prob",
        "weighted = shrink * (weighted - rise * sum);",
        "weighted *= shrink;", "linear_log_prob::test_extreme_logits"),
    Bug("the entropy's gradient lacks its mean", "log_prob",
        " - a + h * mean_below) / sum",
        " - a) / sum", "linear_log_prob::test_every_subset_of_results"),
    Bug("the id's gradient lacks the mean's term", "log_prob",
        "set1(of_p + is.even + args.scale * a)",
        "set1(of_p + args.scale * a)", "linear_log_prob::test_every_subset_of_results"),
    Bug("the last of equals is the largest", "log_prob",
        "if (block_largest > largest) {",
        "if (block_largest >= largest) {", "linear_log_prob::test_top1_is_the_first_of_equals"),
    Bug("the mask goes by the row's place, not by its number", "dropout",
        "args.row_ids ? args.row_ids[row] : row",
        "row", "dropout::test_mask_is_the_references_bit_for_bit"),
    Bug("the tail of a row is not scaled", "dropout",
        "load_n(x + first + i, n) * scale",
        "load_n(x + first + i, n)", "dropout::test_forward_and_backward_match_the_reference"),
    Bug("the generator's key does not change from round to round", "dropout",
        "key0 += 0x9E3779B9u",
        "key0 += 0", "dropout::test_mask_is_the_references_bit_for_bit", "simd/philox.inc"),
    Bug("a weight's gradient lacks its last row", "embedding",
        "k < args.offsets[group + 1]",
        "k < args.offsets[group + 1] - (args.offsets[group + 1] - args.offsets[group] > 1)",
        "embedding::test_lookup_alone_sums_repeated_rows"),
    Bug("the last table is not added", "embedding",
        "t = 1; t < args.tables",
        "t = 1; t < args.tables - 1", "embedding::test_bert_embeddings_match_stock"),
    Bug("the bias gradient lacks the rows behind the last whole fold", "activation",
        "(row + 1 - begin) % kRowsPerFold == 0 || row + 1 == end",
        "(row + 1 - begin) % kRowsPerFold == 0", "gelu::test_forward_and_gradients_match_the_reference"),
    Bug("the gate's bias is the activated half's", "activation",
        "load(bias + columns + i, lanes) : set1(1.0f);\n      gradients",
        "load(bias + i, lanes) : set1(1.0f);\n      gradients",
        "gated_activation::test_two_tensors_match_the_reference"),
    Bug("rows of gradients are as long as those of the output", "activation",
        "static_cast<T*>(args.dgate) + row * args.gradient_stride",
        "static_cast<T*>(args.dgate) + row * columns", "gated_activation::test_halves_match_the_reference"),
    Bug("an infinite gradient passes ReLU's mask as NaN", "activation",
        "keep(positive, kKind == Activation::relu ? upstream : upstream * kept * set1(2.0f))",
        "upstream * keep(positive, kKind == Activation::relu ? set1(1.0f) : kept * set1(2.0f))",
        "bias_activation::test_extreme_numbers", "simd/activation.inc"),
    Bug("SiLU's slope lacks its second term", "activation",
        "fma(x, k * product, gate)",
        "gate", "bias_activation::test_forward_and_gradients_match_the_reference", "simd/activation.inc"),
    Bug("dx is not dropped where the output was", "layer_norm",
        "store(dx + i, dropped(ds), lanes)",
        "store(dx + i, ds, lanes)", "layer_norm::test_fused_matches_the_reference", "simd/layer_norm.inc"),
    Bug("lanes behind the row count in the variance", "layer_norm",
        "const F d = only(load(line + i, lanes) - set1(rough_mean), lanes);",
        "const F d = load(line + i, lanes) - set1(rough_mean);",
        "layer_norm::test_layer_norm_matches_the_reference", "simd/layer_norm.inc"),
    Bug("the slope of the GELU before the norm is left out", "layer_norm_gelu",
        "    if constexpr (A::before) ds = ds * load(slope_line + i, lanes);\n",
        "", "layer_norm_gelu::test_forward_and_gradients_match_the_reference", "simd/layer_norm.inc"),
    Bug("a maximum forgets the rows of earlier blocks", "linear_max",
        "const bool begins = args.offsets[sequence] >= args.first_row;",
        "const bool begins = true;", "block_sizes::test_against_stock"),
    Bug("the last of equal maxima wins", "linear_max",
        "const M higher = exceeds(value, top[i]);",
        "const M higher = exceeds(value + value - top[i] + set1(0.5f), value);",
        "linear_max::test_ties_go_to_the_first_token"),
    Bug("NaN is no maximum", "linear_max",
        "const M higher = exceeds(value, top[i]);",
        "const M higher = top[i] < value;", "linear_max::test_nan_and_infinity_as_torch_max_takes_them"),
    Bug("three terms left over are lost", "linear_max",
        "if (left == 3) add_some<3, true>(terms + k, source, stride, columns, from, total);",
        "", "linear_max::test_matches_torch"),
    Bug("the bias gradient counts sequences without tokens", "linear_max",
        "if (g[v] == 0.0f || token[v] < 0",
        "sums[v - first] += token[v] < 0 ? g[v] : 0.0f;\n      if (g[v] == 0.0f || token[v] < 0",
        "linear_max::test_nothing_to_take_the_maximum_of"),
    Bug("the gradient takes each half's own sine", "rotary",
        "args.inverse ? zero() - high : low",
        "args.inverse ? zero() - low : low", "rotary::test_query_and_key_of_a_projection_match_stock"),
    Bug("columns behind the turned ones are not copied", "rotary",
        "std::memcpy(out + width, x + width, static_cast<size_t>(head_dim - width) * sizeof(T));",
        "(void)head_dim;", "rotary::test_query_and_key_of_a_projection_match_stock"),
    Bug("the value is turned too", "rotary",
        "part < args.rotated ? args.width : 0",
        "args.width", "rotary::test_query_and_key_of_a_projection_match_stock"),
    Bug("a row is turned by its place, not by its number", "rotary",
        "args.row_ids ? args.row_ids[row] : row % args.table_rows",
        "row % args.table_rows", "rotary::test_chosen_rows"),
    Bug("every sequence is the first", "rotary",
        "row / args.sequence * args.batch_stride",
        "0 * args.batch_stride", "rotary::test_layouts"),
]
# fmt: on


@pytest.fixture(scope="module")
def libraries():
    """Name of the bug, or "", -> the library built with it."""
    import ninja
    import pybind11
    from ninja.ninja_syntax import Writer

    includes = f"-I{ROOT / 'csrc'} -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    kernels = {source.stem: source for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))}
    others = [p for folder in ("runtime", "bindings") for p in sorted((ROOT / "csrc/cpu" / folder).glob("*.cpp"))]
    isa = f"-DFASTTUNE_ISA_{ISA.upper()}"
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "build.ninja", "w") as file:
        writer = Writer(file)
        compile_one = f"{COMPILER} -MMD -MF $out.d {FLAGS} $extra {includes} -c $in -o $out"
        writer.rule("compile", compile_one, depfile="$out.d", deps="gcc")
        # The other instruction sets are not there and not called: their symbols stay open.
        writer.rule("link", f"{COMPILER} -shared -Wl,-z,lazy $in -o $out")
        shared = [writer.build(f"other_{p.parent.name}_{p.stem}.o", "compile", str(p))[0] for p in others]
        right = {
            unit: writer.build(f"{unit}.o", "compile", str(path), variables={"extra": isa})[0]
            for unit, path in kernels.items()
        }
        built = {"": writer.build("right.so", "link", [*shared, *right.values()])[0]}
        for number, bug in enumerate(BUGS):
            # A mutated header comes first on the path; a mutated unit is compiled in place of the right one.
            path = Path("cpu") / (bug.source or f"{bug.unit}.cpp")
            text = (ROOT / "csrc" / path).read_text()
            assert text.count(bug.right) == 1, f"{bug.name}: {path} has {bug.right!r} {text.count(bug.right)} times"
            mutated = OUT / f"bug{number}" / path
            mutated.parent.mkdir(parents=True, exist_ok=True)
            changed = text.replace(bug.right, bug.wrong)
            if not mutated.exists() or mutated.read_text() != changed:
                mutated.write_text(changed)
            source = kernels[bug.unit] if bug.source else mutated
            extra = {"extra": f"{isa} -I{OUT / f'bug{number}'}"}
            (wrong,) = writer.build(f"bug{number}.o", "compile", str(source), variables=extra)
            # First, so that inline functions which several units share are taken from it.
            objects = [wrong, *(each for unit, each in right.items() if unit != bug.unit), *shared]
            built[bug.name] = writer.build(f"bug{number}.so", "link", objects)[0]
    jobs = os.environ.get("MAX_JOBS")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(OUT), *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return {name: OUT / target for name, target in built.items()}


def run_tests(library, tests):
    """pytest's exit status and output for tests of tests/ops on that library."""
    nodes = sorted({f"tests/ops/test_{test.partition('::')[0]}.py::{test.partition('::')[2]}" for test in tests})
    environment = {**os.environ, "FASTTUNE_MUTANT": str(library), "FASTTUNE_CPU_ISA": ISA, "CI": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    )
    command = [sys.executable, "-m", "pytest", "-p", "mutant", "-p", "no:cacheprovider", "-q", "-x", "--tb=line"]
    # Tests that ask for an instruction set run on the one that was built alone.
    command += ["-k", " and ".join(f"not {other}" for other in ("baseline", "avx2", "avx512") if other != ISA)]
    done = subprocess.run([*command, *nodes], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture(scope="module")
def runs(libraries):
    """Name of the bug, or "", -> a future of what `run_tests` finds; two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            "": pool.submit(run_tests, libraries[""], [bug.test for bug in BUGS]),
            **{bug.name: pool.submit(run_tests, libraries[bug.name], [bug.test]) for bug in BUGS},
        }
        pool.shutdown(cancel_futures=True)


def test_without_a_bug_they_pass(runs):
    status, output = runs[""].result()
    assert status == 0, output


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_seen(runs, bug):
    status, output = runs[bug.name].result()
    assert status == 1, f"{bug.test} did not fail:\n{output}"
    assert "AssertionError" in output or "assert " in output, output
