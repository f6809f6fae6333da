"""The OpenAI front end: HTTP in OpenAI's form → the Triton model over gRPC.

    openai client ──HTTP──▶ app ──▶ chat, completions, responses ──▶ balancer ──▶ triton_model ──gRPC──▶ Triton Inference Server

| module | one idea |
|---|---|
| `app` | the HTTP service: routes, keys, errors, disconnects |
| `chat` | `/v1/chat/completions` |
| `completions` | `/v1/completions` |
| `responses` | `/v1/responses` |
| `response_body` | what a request for a response may say |
| `response_parameters` | such a request → one for a chat completion |
| `response_input` | its items → messages |
| `response_output` | an answer's parts → a response's items and events |
| `parameters` | a request's parameters → inputs of the Triton model |
| `logprobs` | log probabilities in the form of `/v1/completions` |
| `choices` | several answers to one request, at once |
| `balancer` | several Triton servers as one |
| `triton_model` | the Triton model as a stream of parts |
| `errors` | what can go wrong, in OpenAI's form |
| `settings`, `serve` | starting it |

Types of requests and responses are the `openai` package's. Needs no PyTorch.
"""
