"""`dinfer dap`: the Debug Adapter Protocol for a session, so that VS Code and other editors debug a run.

Ranks are threads; the stack of a rank is op, layer and chunk, with its Python frames where it is in an op; variables
are hidden states and KV in figures. `serve` has the two ways in. A message comes by `wire`; `adapter` answers each
request from a table; `target` is the session and run behind it, `stops` says when and why the run has come to a stand.
`arguments`, `places`, `stack`, `variables` and `console` turn what the protocol says into dinfer's words, and back.
"""
