"""Exports of annotation tools: a module for each layout, which reads it into `labelled.Export`."""
