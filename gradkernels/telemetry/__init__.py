"""Telemetry: what the kernels measure (fields, tables), and what it is on the host (records, snapshots, history)."""

from gradkernels.telemetry.fields import ABS_MAX, FIELDS, NUM_NORMS, NUM_SLOTS, SCALE, TIME_FIELDS
from gradkernels.telemetry.history import History, SiteRows, Stack
from gradkernels.telemetry.measure import measure_reference, measure_steps_reference, with_stats, without_graph
from gradkernels.telemetry.records import Record, record_of
from gradkernels.telemetry.run_file import RunFile, describe_run
from gradkernels.telemetry.snapshot import Snapshot
from gradkernels.telemetry.tables import (
    LOCK,
    check_stats,
    check_time_stats,
    make_room,
    merge_slots,
    new_stats,
    new_time_stats,
    take_rows,
    take_steps,
)
from gradkernels.telemetry.time_profile import TimeProfile, profile_of

__all__ = [
    "ABS_MAX",
    "FIELDS",
    "LOCK",
    "NUM_NORMS",
    "NUM_SLOTS",
    "SCALE",
    "TIME_FIELDS",
    "History",
    "Record",
    "RunFile",
    "SiteRows",
    "Snapshot",
    "Stack",
    "TimeProfile",
    "check_stats",
    "check_time_stats",
    "describe_run",
    "make_room",
    "measure_reference",
    "measure_steps_reference",
    "merge_slots",
    "new_stats",
    "new_time_stats",
    "profile_of",
    "record_of",
    "take_rows",
    "take_steps",
    "with_stats",
    "without_graph",
]
