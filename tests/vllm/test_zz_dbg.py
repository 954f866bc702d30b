
import pytest
PROMPTS = [tuple(range(5 + n, 5 + n + length)) for n, length in enumerate((3, 17, 41, 1, 80, 33, 130, 9))]
def test_x(vllm, ours, greedy):
    names = (None, "all", "rs", "mixed")
    requests = [greedy(prompt, names[n % 4], 24) for n, prompt in enumerate(PROMPTS)]
    vllm.run(vllm.load("all", "rs", "mixed"))
    mixed = vllm.run(vllm.ask_all(requests))
    alone = [vllm.run(vllm.ask(r)) for r in requests]
    alone2 = [vllm.run(vllm.ask(r)) for r in requests]
    mixed2 = vllm.run(vllm.ask_all(requests))
    exp = ours(requests)
    def first(a, b):
        return next((i for i,(x,y) in enumerate(zip(a.tokens,b.tokens)) if x!=y), None)
    with open("/work/wt/vllm/build/dbg.txt","w") as f:
        for n,(m,a,a2,m2,e) in enumerate(zip(mixed,alone,alone2,mixed2,exp)):
            print(n, names[n%4], "m/a", first(m,a), "m/e", first(m,e), "a/e", first(a,e), "a2/e", first(a2,e), "m2/e", first(m2,e), "text", m.text==e.text, file=f)
            if m.text != e.text: print(repr(m.text), repr(e.text), file=f)
