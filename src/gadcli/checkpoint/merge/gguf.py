"""`python -m gadcli.checkpoint.merge.gguf FILE.gguf DIR`: a GGUF model as a Hugging Face folder, in float32."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from gadcli.checkpoint.hub_files import CONFIG, dump, for_older_readers, tokenizer_for_older_readers


def main(source: str, target: str) -> None:
    """Loads `source` with transformers (tokenizer and chat template come from the file) and saves it to `target`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the file; never ask a hub about a local path
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(source)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    out = Path(target)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # A GGUF file brings no folder whose files could be copied: what transformers 5 wrote is made readable for 4.
    config, words = (json.loads((out / name).read_text()) for name in (CONFIG, "tokenizer_config.json"))
    (out / CONFIG).write_bytes(dump(for_older_readers(config)))
    (out / "tokenizer_config.json").write_bytes(dump(tokenizer_for_older_readers(words)))
    lineage = {"kind": "gguf", "source": file.name, "bytes": file.stat().st_size, "dtype": "float32"}
    (out / "gad_lineage.json").write_text(json.dumps(lineage, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
