"""Chats: messages → a prompt, and the model's text → answer, thought and tool calls.

| module | one idea |
|---|---|
| `messages` | what messages, tools and a tool choice may be, in the OpenAI form |
| `template` | the checkpoint's chat template: messages → prompt |
| `markup` | a text that comes in pieces → plain text and tags |
| `reasoning` | the thought, taken out of an answer |
| `tools` | tool calls, taken out of an answer |
| `answer` | the three above, put together |

Needs no PyTorch.
"""
