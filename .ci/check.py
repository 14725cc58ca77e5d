"""Checks what `make run` printed and wrote in the current folder."""

import json
import subprocess
import sys
from pathlib import Path

log = Path(sys.argv[1]).read_text()
for word in ("pass@1", "bits/byte", "reports/index.html", "models/tuned", "make ui", "tokens/s"):
    assert word in log, f"the run did not print {word!r}"
figures = json.loads(Path("metrics/evaluate.json").read_text())
for model in ("base", "compressed", "quantized", "tuned"):
    for key in ("pass_at_1", "bits_per_byte", "stored_bytes"):
        assert f"{model}.{key}" in figures, f"metrics/evaluate.json lacks {model}.{key}"
assert figures["base.stored_bytes"] >= 5 * figures["quantized.stored_bytes"], (
    "not five times smaller"
)
page = Path("reports/index.html").read_text()
assert "<svg" in page, "the report has no plots"
assert "http://" not in page.replace("http://www.w3.org", ""), "the report asks the network"
for folder in (
    "data/corpus",
    "models/base",
    "models/compressed",
    "models/quantized",
    "models/tuned",
):
    subprocess.run([".venv/bin/drawplate", "verify", folder], check=True)
subprocess.run([".venv/bin/drawplate", "lineage", "models/tuned"], check=True)
print("make run printed and wrote what it should")
