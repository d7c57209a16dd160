"""Graphs that others exported, wired by a TOML file.

description   the file, checked           (toml_table: reading it strictly)
graphs        an .onnx file, normalised       (modules: its layers' names, tidy: its forms, sizes: of what is inside)
wires         an input's source           (tokens, labels, another graph's output, ...)
adapt         a graph, in trimtab's form
parts         all of them, as `trimtab.export.parts.Parts`
files         the whole job
"""
