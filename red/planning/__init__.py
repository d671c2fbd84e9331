"""What a distillation will need, from shapes alone: parameters, memory, FLOPs, time."""
