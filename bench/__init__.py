"""The benchmark: cases, a correctness gate, measurements in processes of their own, tables and plots.

Design fact: what starts and judges measurements (`run`), what describes them (`cases`, `adapters`) and what draws
them (`plot`, `report`) import no framework; only the child processes do.
"""
