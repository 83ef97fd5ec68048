"""How SGLang's scheduler books the tokens of a decoding step here: only what requests of this project ask for.

SGLang calls some ten functions for each token and walks through the batch once more to see who gets an answer: most of
what its one Python process does while replies are short or many run at once, and the GPU waits for it. A request of
`SGLangEngine` wants tokens, log-probs and versions, at its end and not before.
"""

from __future__ import annotations

from typing import Any

from asyncrl.engines.stop_texts import is_said

VERSIONS_KEY = "asyncrl_versions"
"""Where in an output's `meta_info` the version of each token is."""


def replace_results(scheduler: Any) -> None:
    """In the scheduler's process. Where a model or the user's arguments want more at each token, SGLang's own stays."""
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

    arguments = scheduler.server_args
    if (
        scheduler.tree_cache.supports_mamba()
        or not scheduler.spec_algorithm.is_none()
        or arguments.disaggregation_mode != "null"
        or arguments.disaggregation_decode_enable_offload_kvcache
    ):
        return
    whole = SchedulerBatchResultProcessor.process_batch_result_decode

    def process_batch_result_decode(processor: Any, batch: Any, result: Any) -> None:
        if batch.return_logprob:
            book(processor, batch, result)
        else:
            whole(processor, batch, result)

    SchedulerBatchResultProcessor.process_batch_result_decode = process_batch_result_decode


def book(processor: Any, batch: Any, result: Any) -> None:
    """Gives each request of the batch its token; those that end with it are answered."""
    if result.copy_done is not None:
        result.copy_done.synchronize()
    output = result.logits_output
    tokens, logprobs = result.next_token_ids.tolist(), output.next_token_logprobs.tolist()
    version = output.customized_info[VERSIONS_KEY][0]
    ended = []
    processor.token_to_kv_pool_allocator.free_group_begin()
    for place, (req, token, logprob) in enumerate(zip(batch.reqs, tokens, logprobs, strict=True)):
        if req.finished_reason is not None or req.is_retracted:
            continue  # overlapped: the step was launched before that was known
        req.output_ids.append(token)
        req.logprob.output_token_logprobs_val.append(logprob)
        req.logprob.output_token_logprobs_idx.append(token)
        if may_end(req, token):
            req.time_stats.set_last_decode_finish_time()
            req.update_finish_state()
            ended.append(req)
            processor._handle_finish_state_updated_req(req, batch, result, place, output)
        else:
            req.customized_info[VERSIONS_KEY].append(version)
    if ended:
        processor.output_streamer.stream_output(ended, True)
    processor.token_to_kv_pool_allocator.free_group_end()
    reporter = processor.metrics_reporter
    reporter.num_generated_tokens += len(batch.reqs)
    reporter.forward_ct_decode = (reporter.forward_ct_decode + 1) % (1 << 30)
    reporter.report_decode_stats(result.can_run_cuda_graph, running_batch=batch, num_correct_drafts=0)


def may_end(req: Any, token: int) -> bool:
    """Whether `update_finish_state` has to look at the request: it was aborted, is long enough, or has a stop token or
    text."""
    limits = req.sampling_params
    return (
        req.to_finish is not None
        or len(req.output_ids) >= limits.max_new_tokens
        or token in (limits.stop_token_ids or ())
        or not 0 <= token < req.vocab_size
        or (bool(limits.stop_strs) and is_said(req.output_ids, limits.stop_strs, req.tokenizer.decode))
    )
