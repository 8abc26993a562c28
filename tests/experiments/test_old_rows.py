"""Run folders of every row with the params.json of the first published commit are still accepted."""

import gzip
import json
from pathlib import Path

import pytest

from misa.engine.runs.folder import recorded
from misa.engine.runs.record import require_own, run_params
from misa.rows import find_row

STORED = Path(__file__).with_name("old_rows.json.gz")  # of commit 531f548: one of each row
PARAMS = json.loads(gzip.decompress(STORED.read_bytes()))
# Rows whose values were not those of their sources: norms that decay, and a warm-up or batch.
CORRECTED = {
    *(f"table1_coco:{name}_r101" for name in ("mask_rcnn", "solo", "solov2", "condinst", "boxinst")),
    *("table1_coco:boxinst_r50", "table2_voc:boxinst_r50", "table2_voc:boxinst_r101"),
}


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: params["row"])
def test_an_old_record_is_the_rows_of_today(tmp_path, params):
    if params["row"] in CORRECTED:
        assert find_row(params["row"]).digest() != params["digest"]
        return
    (tmp_path / "params.json").write_text(json.dumps(params))
    experiment, _, read = recorded(tmp_path)
    assert experiment == find_row(params["row"])
    assert experiment.digest() == params["digest"]
    assert read == params
    today = run_params(
        experiment,
        row=params["row"],
        seed=params["seed"],
        data_root=Path(params["data_root"]),
        data={"train": "0", "val": "0"},  # not recorded then
        classes=params["classes"],
    )
    require_own(tmp_path, today)
    assert json.loads(json.dumps({name: today[name] for name in params})) == params
