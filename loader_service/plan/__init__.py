"""Which sample stands where: lanes of windows of rows, as a pure function of manifest, seed and epoch.

In: an entry's manifest. Out: a `LanePlan`, saved as files that workers map.
Read `lane_plan` (what every plan is), `record_plan` (one row per sample) and `row_plan` (rows of text), `packing`,
`token_counts`, `plan_files`.
"""
