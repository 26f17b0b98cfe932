"""`import fasttune` and `fasttune.ops` work where Transformers does not, and do not import it where it does."""

import subprocess
import sys

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
sys.meta_path.insert(0, Block())
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_without_transformers():
    code = BLOCK + (
        "import torch, fasttune, fasttune.ops\n"
        "assert 'transformers' not in sys.modules\n"
        "try: fasttune.patch(torch.nn.Linear(1, 1))\n"
        "except fasttune.UnsupportedModelError as error: assert 'gpt2' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_import_leaves_transformers_alone():
    done = run("import sys, fasttune; assert 'transformers' not in sys.modules; print(fasttune.__all__)")
    assert done.returncode == 0, done.stderr
    names = ["UnsupportedModelError", "Verification", "__version__", "patch", "patched", "report", "unpatch", "verify"]
    assert done.stdout.strip() == str(names)


def test_a_pickled_patched_model_loads_in_a_fresh_process(tmp_path):
    import torch
    from models import batch_of, build, loss_of

    import fasttune

    model = fasttune.patch(build("GPT2LMHeadModel"), norms=False, mlp=False, embeddings=False, loss=False)
    inputs = batch_of(model)
    torch.save((model, inputs, loss_of(model, inputs).item()), tmp_path / "model.pt")
    done = run(
        f"import torch; model, inputs, loss = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert abs(model(**inputs).loss.item() - loss) < 1e-5"
    )
    assert done.returncode == 0, done.stderr
