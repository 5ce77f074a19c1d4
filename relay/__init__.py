"""The permanent side: accounts, a queue, storage, and one URL in front of gpus that come and go."""
