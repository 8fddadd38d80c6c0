"""What the tasks are and what they train on: task files, data sets, length distributions, traces.

``tasks``      task declarations in YAML to ``TaskSpec``
``datasets``   files of text, completions or chats to sequences with targets (``DatasetLibrary``)
``synthetic``  lengths drawn from shipped histograms (``SyntheticLibrary``)
``traces``     recorded or drawn arrivals to a stream of tasks
"""
