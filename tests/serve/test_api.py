"""The routes."""
import asyncio, json
import httpx, pytest
from contextlib import asynccontextmanager
from pascaline.serve.api import app
from pascaline.serve.options import Options
from fake import FakeEngine

@asynccontextmanager
async def client(engine, **options):
    made = app(engine, Options(**options))
    async with made.router.lifespan_context(made):
        while not made.state.service.ready: await asyncio.sleep(0.001)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://localhost") as c:
            c.made = made
            yield c

def test_x():
    async def go():
        e=FakeEngine()
        async with client(e) as c:
            r = await c.post("/v1/chat/completions", json={"model":"model","messages":[{"role":"user","content":"hi"}],"logprobs":True,"top_logprobs":2})
            print(r.status_code, r.text[:1500])
            r = await c.post("/v1/chat/completions", json={"model":"model","messages":[{"role":"user","content":"hi"}],"stream":True, "stream_options":{"include_usage":True}, "n":2})
            print(r.status_code, r.text[:3000])
            r = await c.post("/v1/completions", json={"model":"model","prompt":["hi a","b"],"echo":True,"logprobs":1,"max_tokens":1})
            print(r.status_code, r.text[:3000])
            for path in ("/v1/models","/v1/models/model","/v1/models/x","/health","/ready","/version","/metrics","/openapi.json","/nope"):
                r = await c.get(path); print(path, r.status_code, r.text[:200])
            r = await c.post("/tokenize", json={"messages":[{"role":"user","content":"hi"}]}); print(r.text)
            r = await c.post("/v1/chat/completions", content=b"["*1000000, headers={"content-type":"application/json"}); print(r.status_code, r.text)
            r = await c.post("/v1/chat/completions", content=b'{"messages":[{"role":"user","content":"\\ud800"}]}', headers={"content-type":"application/json"}); print(r.status_code, r.text)
            r = await c.post("/v1/chat/completions", json={"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://x"}}]}]}); print(r.status_code, r.text)
            r = await c.post("/v1/chat/completions", json={"messages":[{"role":"user","content":"POISON"}]}); print(r.status_code, r.text)
            r = await c.post("/v1/chat/completions", json={"messages":[{"role":"user","content":"POISON"}],"stream":True}); print(r.status_code, r.text)
            assert e.empty
    asyncio.run(go())
