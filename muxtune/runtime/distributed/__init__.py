"""Instances on several GPUs: tensor and pipeline parallel ranks, and replicas of unequal shapes.

``layout``    which rank holds what
``sharding``  a rank's part of the model and of the adapters
``schedule``  the plan's order as work of one rank
``eager``     forward and backward of a stage, half a layer at a time
``links``     process groups, and the streams that run transfers
``stepping``  optimizer steps over ranks
``runner``    a rank's streams at work
``worker``    what a rank does at the controller's command
``team``      commands and reports
``instance``  the controller's side, behind the executor's seam
``launch``    starting, checking and watching the ranks of a run
"""
