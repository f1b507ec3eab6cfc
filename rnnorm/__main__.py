"""`python -m rnnorm`: list the backends, and for each that cannot run on this machine the reason."""

import torch

import rnnorm

if __name__ == "__main__":
    print(f"rnnorm {rnnorm.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name, reason in rnnorm.backends(device).items():
            print(f"  {device:<5} {name:<10} {'runs' if reason is None else 'cannot run: ' + reason}")
        reason = rnnorm.why_not_bfloat16(device)
        print(f"  {device:<5} bfloat16   {'products by the device' if reason is None else 'not used: ' + reason}")
