"""Engine protocols of others, served beside the `Orchestrator` service.

A servicer here only translates: from message, to work for the cell's engine, to message.

`vllm_engine` is the service `vllm.grpc.engine.VllmEngine`; `vllm_fields` says of every field of its
requests whether it is handled, `vllm_requests` reads them, `vllm_responses` writes the answers.
`tokenizer_archive` packs a model's tokenizer, `model_info` and `loads` say what a cell is and does.
"""
