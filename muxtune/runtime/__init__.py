"""The real executor: a frozen backbone shared by many tasks, in torch.

Needs the ``train`` extra. The core never imports this package.
"""
