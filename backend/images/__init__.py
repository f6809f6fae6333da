"""Images of a prompt, between the request and the engine.

| module | one idea |
|---|---|
| `limits` | what an image that a client sends may be |
| `decode` | an image file → pixels |
| `fetch` | a URL → an image file, from public addresses alone |
| `local` | the images of a program on this machine, which may name its files |
| `loading` | the images of a request, however they are given → patches |
| `pool` | loading them in threads, within a bound on memory |
| `preprocess` | a decoded image → the pixel patches that the vision program reads |
| `placeholders` | one placeholder in a prompt → the tokens that stand for the image, and back to where they are |
"""
