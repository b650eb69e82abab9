"""The language model: its files, loading, generation and fine-tuning.

files          where a model or adapter lies on disk, and fingerprints of its files; needs no torch
loading        transformers and bitsandbytes without their noise, and with our errors
adapters       peft's adapters on a base
checks         what a model must be, or its influence would be wrong
fingerprints   fingerprints of a model and tokenizer in memory
model          load a model, or adopt one from memory; greedy generation
outputs        the folder that a training writes to: its record, its lock
finetune       options, resuming
schedule       the weights of a training's checkpoints, by its learning rates
training       the training itself, with transformers' Trainer
"""
