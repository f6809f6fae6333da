"""What passes between the two halves: the resolved model, the checkpoint's tensors and the engine directory's manifest; and
what both need.

| module | holds |
|---|---|
| `model_config` | the resolved model: every size and constant that a program or the runtime needs |
| `checkpoint` | the tensors of a checkpoint directory, memory-mapped |
| `manifest` | `manifest.json` of an engine directory |
| `end_with_parent` | a child process that ends when its parent does |
| `standard_streams` | the standard streams of a command, closed or full |
| `problems` | what is wrong, in lines |
| `regular_file` | paths that are opened to be read, of files alone |
| `own_directory` | temporary directories, which do not outlive their process for long |
"""
