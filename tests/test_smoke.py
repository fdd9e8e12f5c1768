import asyncio, handleipc
async def test_smoke(program):
    p = program("child.py", """
        import asyncio, handleipc
        async def main():
            parent = await handleipc.parent()
            async for m, h in parent:
                await parent.send([m, parent.dialect])
        asyncio.run(main())
    """)
    child = await handleipc.fork(p)
    await child.send({"a": 1})
    assert await child.recv() == ([{"a": 1}, "native"], None)
    child.disconnect()
    assert await child.wait() == 0
