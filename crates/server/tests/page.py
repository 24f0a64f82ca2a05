"""Tests the chat page in headless Chromium: page.py http://127.0.0.1:PORT [--chromium PATH]

The server must run with scripted answers. Prints 'ok NAME' or 'not ok NAME - why'; exit status 0 only if all pass, 77 if there
is no Chromium. Standard library only: Chromium is driven by the DevTools protocol over a pair of pipes.
"""
import argparse
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from urllib.parse import urlsplit

THOUGHT = "I must think about this. <b>no tag</b>"
ANSWER = "HARNESS-SDK-DONE žluťoučký kůň 日本語 🐴✓"
STATS = r"^[\d,]+ tokens, [\d.]+ t/s; prompt ([\d,]+) tokens, ([\d,]+) from cache"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "opts": {"type": "object"}}}}}]
# A cache may keep only long prefixes.
FILLER = " ".join(f"This is sentence {n} of a text that takes its time." for n in range(40))
NAMES = "chromium", "chromium-browser", "google-chrome"


class Browser:
    def __init__(self, path, profile):
        # Chromium reads from descriptor 3 and writes to 4, one JSON text after the other with a zero byte behind each.
        theirs, self.to = os.pipe()
        self.back, out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs, out)]     # out of the way of 3 and 4
        self.process = subprocess.Popen(
            # The page comes from the server under test, and in containers the sandbox often cannot start.
            [path, "--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
             "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", "--disable-background-networking",
             "--disable-component-update", "about:blank"],
            pass_fds=(3, 4), preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (theirs, out, *high):
            os.close(fd)
        self.rest, self.last, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def read(self, until):
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium is silent")
            data = os.read(self.back, 1 << 20)
            if not data:
                raise EOFError("Chromium has gone")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data):]
        until = time.monotonic() + 60
        while True:
            answer = self.read(until)
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression[:80]}: {result['exceptionDetails'].get('exception', {}).get('description')}")
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        until = time.monotonic() + seconds
        while not (value := self.js(expression)):
            if time.monotonic() > until:
                raise TimeoutError(f"{expression} | page: {self.js('document.body.innerText')[-400:]!r}")
            time.sleep(.02)
        return value

    def key(self, name, code, text=None, modifiers=0):
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, modifiers=modifiers, **extra)

    def params(self, method):
        return [e["params"] for e in self.events if e["method"] == method]

    def bodies(self):
        """What the page has asked the model, oldest first."""
        sent = [p["request"] for p in self.params("Network.requestWillBeSent")]
        return [json.loads(r["postData"]) for r in sent if r["url"].endswith("/v1/chat/completions") and r["method"] == "POST"]


parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--chromium")
args = parser.parse_args()
url = args.url.rstrip("/")
chromium = args.chromium or next(filter(None, map(shutil.which, NAMES)), None)
if not chromium:
    print(f"no Chromium found ({', '.join(NAMES)}); name one by --chromium")
    sys.exit(77)
failed = 0


def check(name):
    def run(test):
        global failed
        try:
            test()
            print(f"ok {name}", flush=True)
        except Exception as e:
            failed += 1
            print(f"not ok {name} - {type(e).__name__}: {' '.join(str(e).split())[:600]}", flush=True)
    return run


def equal(got, wanted, what="value"):
    if got != wanted:
        raise AssertionError(f"{what} is {got!r}, not {wanted!r}")


def last(selector, what="textContent"):
    return f"[...document.querySelectorAll('#messages > .assistant')].at(-1)?.querySelector({selector!r})?.{what}"


def write(text):
    b.js("input.focus()")
    b.call("Input.insertText", text=text)


def idle():
    b.wait("!document.querySelector('#send').hidden && document.querySelector('#stop').hidden")


def ask(text):
    """Sends a message and waits for the whole answer."""
    before = b.js("document.querySelectorAll('#messages > .assistant').length")
    write(text)
    b.key("Enter", 13, "\r")
    b.wait(f"document.querySelectorAll('#messages > .assistant').length === {before + 1}")
    idle()


def figures():
    found = re.match(STATS, b.js(last(".stats")) or "")
    if not found:
        raise AssertionError(f"the stats are {b.js(last('.stats'))!r}")
    return [int(n.replace(",", "")) for n in found.groups()]


def fill(selector, text):
    b.js(f"document.querySelector({selector!r}).value = {json.dumps(text)}")


def click(*selectors):
    for selector in selectors:
        b.js(f"document.querySelector({selector!r}).click()")


def fake(status=200):
    """From now on the test itself is the server: feed() sends bytes, finish() ends the answer."""
    b.js(f"""window.asked = []; window.realFetch ??= window.fetch; window.feeder = null;
        window.fetch = async (url, options) => {{
            asked.push(options);
            return new Response(new ReadableStream({{start(c) {{ window.feeder = c; }}}}), {{status: {status}}});
        }}; 0""")


def feed(data):
    b.js(f"feeder.enqueue(new Uint8Array({list(data)}))")


def finish():
    b.js("feeder.close()")
    idle()


profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
b = Browser(chromium, profile.name)
try:
    @check("the page loads and names the model")
    def _():
        b.call("Page.navigate", url=url + "/")
        b.wait("document.readyState === 'complete' && /context/.test(document.getElementById('model')?.textContent)")
        ids = "input", "send", "stop", "new", "thinking", "system", "messages"
        equal([i for i in ids if not b.js(f"!!document.getElementById('{i}')")], [], "missing ids")
        equal(b.js("['send', 'stop', 'key-row'].map(i => document.getElementById(i).hidden).join()"), "false,true,true")

    if failed:
        sys.exit(1)     # without a page there is nothing else to see

    @check("everything has a name, and the messages are announced")
    def _():
        equal(b.js("messages.getAttribute('aria-live')"), "polite")
        equal(b.js("[...document.querySelectorAll('button, input, textarea')].filter(e => !(e.labels?.length || e.getAttribute('aria-label') "
                   "|| e.textContent.trim())).map(e => e.outerHTML)"), [], "nameless")

    @check("Shift+Enter makes a line, Enter sends, the answer comes")
    def _():
        write("HARNESS-SDK-TEXT one")
        b.key("Enter", 13, "\r", modifiers=8)
        equal(b.js("messages.children.length"), 0, "messages")
        ask(FILLER)
        equal(b.js("document.querySelector('.message.user .content').textContent"), f"HARNESS-SDK-TEXT one\n{FILLER}")
        equal(b.js(last(".content")), ANSWER)

    @check("thinking is shown as text, not as markup")
    def _():
        equal(b.js(last("details.thinking .thought")).strip(), THOUGHT)
        equal(b.js("document.querySelectorAll('#messages b').length"), 0, "bold elements")
        equal(b.js(last("details.thinking", "open")), False, "open")

    @check("the figures are shown")
    def _():
        prompt, cached = figures()
        if not 0 <= cached <= prompt:
            raise AssertionError(f"{cached} of {prompt}")

    @check("a second message finds the first in the cache")
    def _():
        ask("HARNESS-SDK-TEXT two")
        equal(b.js(last(".content")), ANSWER)
        equal([m["role"] for m in b.bodies()[-1]["messages"]], ["user", "assistant", "user"], "roles")
        equal(b.bodies()[-1]["messages"][1]["reasoning_content"].strip(), THOUGHT, "reasoning sent again")
        if figures()[1] <= 0:
            raise AssertionError("nothing was cached")

    @check("without thinking, with a system text, in a new chat")
    def _():
        click("#new", "#thinking")
        equal(b.js("messages.children.length"), 0, "messages")
        fill("#system", "Be brief.")
        ask("HARNESS-SDK-TEXT three")
        equal(b.js(last(".content")), ANSWER)
        equal(b.js("document.querySelectorAll('.thinking').length"), 0, "thoughts")
        body = b.bodies()[-1]
        equal((body["thinking"], body["messages"][0]), ({"type": "disabled"}, {"role": "system", "content": "Be brief."}))
        click("#new", "#thinking")
        fill("#system", "")

    @check("a tool is called, and its result goes back")
    def _():
        fill("#tools", json.dumps(TOOLS))
        ask("HARNESS-SDK-TOOL please")
        equal(b.js(last(".tool-call .tool-name")), "get_weather")
        shown = b.js(last(".tool-call pre"))
        equal(json.loads(shown), {"city": 'Praha <&> "x"', "days": 3, "opts": {"units": "C", "list": [1, 2.5, None, True]}})
        if "\n" not in shown:
            raise AssertionError("the arguments are not laid out")
        fill(".tool-result", "sunny <i>23</i>")
        click(".send-results")
        b.wait("document.querySelectorAll('#messages > .assistant').length === 2")
        idle()
        equal(b.js(last(".content")), "HARNESS-SDK-TOOL-DONE")
        _, call, result = b.bodies()[-1]["messages"]
        equal(result, {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "sunny <i>23</i>"})
        equal(call["reasoning_content"].strip(), THOUGHT, "reasoning sent again")

    @check("tools that are no JSON are an error, and can be mended")
    def _():
        click("#new")
        fill("#tools", "[{")
        n = len(b.bodies())
        write("HARNESS-SDK-TEXT four")
        b.key("Enter", 13, "\r")
        b.wait("/not a JSON array/.test(document.querySelector('.error')?.textContent)")
        equal(len(b.bodies()), n, "requests")
        fill("#tools", "")
        click(".error button")
        b.wait("!!document.querySelector('.assistant .stats')")
        equal(b.js("document.querySelectorAll('.error').length"), 0, "errors")
        equal(b.js(last(".content")), ANSWER)

    @check("an answer streams in, and Stop ends it")
    def _():
        click("#new")
        write("HARNESS-SDK-LONG please")
        click("#send")
        size = last(".content", "textContent.length ?? 0")
        first = b.wait(size)
        b.wait(f"({size}) > {first}")
        equal(b.js("document.querySelector('#send').hidden && !document.querySelector('#stop').hidden"), True, "running")
        click("#stop")
        b.wait(f"!document.querySelector('#send').hidden && /stopped/.test({last('.stats')})", 5)
        equal(b.js(f"/word3999/.test({last('.content')})"), False, "the whole answer came")
        ask("HARNESS-SDK-TEXT and now?")
        equal(b.js(last(".content")), ANSWER)
        equal([m["role"] for m in b.bodies()[-1]["messages"]], ["user", "assistant", "user"], "roles")

    @check("progress, code blocks, characters in pieces, an error within a stream")
    def _():
        click("#new")
        fake()
        write("fake")
        b.key("Enter", 13, "\r")
        b.wait("!!window.feeder")
        feed(b": prefill 512/2048\n\n")
        b.wait("/512 of 2,048/.test(messages.textContent) && document.querySelector('progress').value === 512")
        text = "A ``` b\n```html\n<p>🐴</p>\n```\nend <i>"
        data = f"data: {json.dumps({'choices': [{'delta': {'content': text}}]}, ensure_ascii=False)}\r\n\r\n".encode()
        half = data.index("🐴".encode()) + 2
        feed(data[:half])
        feed(data[half:])
        b.wait(f"/end/.test({last('.content')})")
        equal(b.js(last(".content")), "A ``` b\n<p>🐴</p>\nend <i>")
        equal(b.js(last("pre code")), "<p>🐴</p>\n")
        feed(b'data: {"error":{"message":"it <b>broke</b>"}}\n\n')
        b.wait("/it <b>broke<.b>/.test(document.querySelector('.error')?.firstChild.data)")
        idle()

    @check("a refusal for want of a key asks for one and sends it")
    def _():
        click("#new")
        fake(401)
        write("fake")
        click("#send")
        b.wait("!!window.feeder")
        feed(b'{"error":{"message":"a key is wanted"}}')
        finish()
        b.wait("/a key is wanted/.test(document.querySelector('.error')?.textContent) && !document.getElementById('key-row').hidden")
        b.js("window.fetch = async (url, options) => { asked.push(options); return realFetch(url, options); }; key.focus()")
        b.call("Input.insertText", text="secret")
        b.js("key.blur()")
        click(".error button")
        b.wait("!!document.querySelector('.assistant .stats')")
        equal(b.js("asked.at(-1).headers.Authorization"), "Bearer secret")
        equal(b.js("sessionStorage.getItem('key')"), "secret")
        b.wait("document.getElementById('key-row').hidden")

    @check("the page asks nobody but its server")
    def _():
        asked = {p["request"]["url"] for p in b.params("Network.requestWillBeSent")}
        equal([u for u in asked if not u.startswith("data:") and urlsplit(u).netloc != urlsplit(url).netloc], [], "foreign")
        equal(len(asked) >= 3, True, "requests were seen")

    @check("no errors in the console")
    def _():
        bad = [e["exceptionDetails"]["text"] for e in b.params("Runtime.exceptionThrown")]
        bad += [str(e["args"]) for e in b.params("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")]
        bad += [e["entry"]["text"] for e in b.params("Log.entryAdded") if e["entry"]["level"] in ("error", "warning")]
        equal(bad, [], "messages")
finally:
    b.process.terminate()
    b.process.wait(20)
sys.exit(1 if failed else 0)
