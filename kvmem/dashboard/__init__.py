"""One live page over running engines: `kvmem dashboard`; see docs/dashboard.md.

    source    where states come from: an engine of this machine, or anything that answers alike
    tree      chains of blocks as one tree: who shares what, cut to what can be seen
    state     what one engine was last seen to be; asks again no more often than that costs little
    guard     who may look: token, hosts, the headers of every answer
    app       the routes, and the page's files in static/
    plugin    the same page on vLLM's own server, inside `kvmem serve`

Nothing here is text of a prompt, and a tenant is a digest (I11). The engine works only while
somebody looks.
"""
