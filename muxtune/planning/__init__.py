"""From plans to micro-batches, and the record of decisions.

``packing``       one task's batch to micro-batch contributions
``step_builder``  plans and cursors to rounds, forecasts and loads (``StepBuilder``, ``pass_load``)
``expected``      what a task's steps will look like, from a summary of its lengths
``journal``       the decision log
``facts``, ``walking``, ``tables``, ``tracks`` are the inside of ``step_builder``.
"""
