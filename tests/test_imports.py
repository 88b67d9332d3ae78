"""What `import being_vl` needs: the standard library and numpy."""

import subprocess
import sys

SCRIPT = """
import sys

ALLOWED = sys.stdlib_module_names | {"numpy", "being_vl"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("the test does not refuse anything")

import numpy as np
from being_vl import EncodedBatch, VisualBPE
import being_vl.errors

grids = np.arange(64).reshape(4, 4, 4) % 3
bpe = VisualBPE.train(grids, 3, 10, merge_mode="oriented")
bpe.save(sys.argv[1])
bpe = VisualBPE.load(sys.argv[1])
assert isinstance(bpe.encode_batch(grids), EncodedBatch)
assert (bpe.decode(bpe.encode(grids[0]), 4, 4) == grids[0]).all()
extra = {name.partition(".")[0] for name in sys.modules} - ALLOWED
print(sorted(name for name in extra if not name.startswith("_")))
"""


def test_numpy_is_all_that_the_tokenizer_needs(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "vocab.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
