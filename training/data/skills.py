"""Generators of conversations.  Each takes (r, split) and returns a dict: turns, optional system and tools, and `check`
(how an evaluation judges the last answer).  split is "train" or "eval"; value combinations never cross."""
import datetime
import json

from words import *

SYSTEMS = ["", "", "", "", "You are a helpful assistant.", "You are ds4-nano, a small assistant.", "Be brief.", "You are a helpful, concise assistant."]


def one(user, reason, answer, check=None, **kw):
    return {"turns": [(user, reason, answer, None)], "check": check or {"kind": "exact", "value": answer}, **kw}


# ------------------------------------------------------------------ stories

def story_text(r, hero=None, kind=None, thing=None):
    n, kind = hero or name(r), kind or r.choice(ANIMALS + JOBS)
    adj, adj2, t, p = r.choice(ADJ[:23]), r.choice(ADJ[23:]), thing or r.choice(THINGS), r.choice(NATURE)
    friend, fk = name(r), r.choice(ANIMALS)
    s = [r.choice([f"Once upon a time there was {a(adj)} {kind} called {n}.", f"There once lived {a(adj)} {kind} whose name was {n}.",
                   f"Long ago, near {a(r.choice(ADJ[23:]))} {p}, lived {a(adj)} {kind} named {n}."]),
         r.choice([f"{n} lived near the {p} and loved to walk there.", f"Every morning {n} walked to the {p}.",
                   f"{n} had one wish: to see what was behind the {p}."]),
         r.choice([f"One day {n} {r.choice(VERBS[:1])} {a(adj2)} {t} on the path.", f"One evening {n} saw {a(adj2)} {t} under a tree.",
                   f"Then, one {r.choice(WEATHER)} day, {a(adj2)} {t} was gone."]),
         r.choice([f'"What is this?" asked {n}.', f'"I wonder who owns the {t}," said {n}.', f'"How strange," thought {n}.'])]
    mid = [f"{a(r.choice(ADJ[:23])).capitalize()} {fk} called {friend} came along.", f"{friend} the {fk} was sitting by the {r.choice(NATURE)}.",
           f'"Can you help me?" {n} asked {friend}.', f'"Of course," said {friend}, "let us go together."',
           f"They walked past the {r.choice(NATURE)} and over the {r.choice(NATURE)}.", f"It was {r.choice(WEATHER)}, but they did not stop.",
           f"On the way they met {a(r.choice(JOBS))} who gave them some {r.choice(FOODS)}.", f"The {t} was heavier than it looked.",
           f"{friend} told a story about {a(r.choice(COLOURS))} {r.choice(THINGS)}, and {n} laughed."]
    k = sorted(r.sample(range(len(mid)), r.randint(2, 6)))
    s += [mid[i] for i in k]
    s += [r.choice([f"At last they found the owner of the {t}, {a(r.choice(ADJ[:23]))} {r.choice(JOBS)}.", f"In the end the {t} shone in the dark and showed them the way home.",
                    f"When night came, they hid the {t} behind the {p}."]),
          r.choice([f"From that day on, {n} and {friend} were best friends.", f"{n} went home happy.", f"And {n} never forgot that day.",
                    f'"We did it together," said {n}, and {friend} smiled.'])]
    return " ".join(s)


def story(r, split):
    kind, t, n = r.choice(ANIMALS + JOBS), r.choice(THINGS), name(r)
    q, kw = r.choice([(f"Tell me a story about {a(kind)}.", dict(kind=kind)), (f"Write a short story about {a(t)}.", dict(thing=t)),
                      (f"Tell me a short story about {a(kind)} named {n}.", dict(kind=kind, hero=n)),
                      (f"Please write a story with {a(kind)} and {a(t)}.", dict(kind=kind, thing=t)),
                      ("Tell me a story.", {}), (f"Can you tell me a story about {n}?", dict(hero=n))])
    text = story_text(r, **kw)
    key = kw.get("hero") or kw.get("kind") or kw.get("thing") or "the"
    c = one(q, f"The user wants a short story{' about ' + key if kw else ''}. I will write a simple one with a beginning, a middle and an end.",
            text, {"kind": "contains", "value": key}, system=r.choice(SYSTEMS))
    return c


# ------------------------------------------------------------------ chat

HI = ["Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "Hi there", "Hey there", "Good day", "Greetings"]
PAIRS = [
    (["How are you?", "How are you doing?", "How do you do?", "How is it going?", "Are you well?"], ["I am fine, thank you. How can I help you?", "I am doing well, thank you. What can I do for you?"]),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.", "What should I call you?", "Are you a human?", "Are you a person?"],
     ["I am ds4-nano, a tiny language model that comes with ds4. I can chat a little, do small sums, call tools and look up facts in a text."]),
    (["What can you do?", "How can you help me?", "What are you good at?", "What can I ask you?", "Help"],
     ["I can chat, tell short stories, do small sums, pull data out of a text as JSON, call tools, and answer questions about ds4."]),
    (["Thank you!", "Thanks a lot.", "Thanks!", "Thank you very much.", "Great, thanks."], ["You are welcome!", "You are welcome. Is there anything else?"]),
    (["Goodbye!", "Bye!", "See you later.", "Good night!", "I have to go now."], ["Goodbye! Have a nice day.", "Goodbye, and take care!"]),
    (["Are you clever?", "Are you smart?", "Do you know everything?", "Can I trust your answers?", "Do you make mistakes?"],
     ["I am a very small model and I make mistakes. Please check what I say. For serious work, run a full model with ds4."]),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."],
     ["Why did the computer go to the doctor? Because it had a virus!", "What do you call a fish without eyes? A fsh!", "Why was the maths book sad? It had too many problems."]),
    (["I am bored.", "What should I do today?", "I have nothing to do."], ["You could read a book, take a walk, or ask me for a story.", "How about a walk outside, or a short story from me?"]),
    (["I am sad today.", "I feel sad.", "I had a bad day."], ["I am sorry to hear that. Would you like to talk about it, or shall I tell you a story?"]),
    (["I am happy today.", "I feel great!", "I had a good day."], ["That is good to hear! What made you happy?"]),
    (["What is the weather like?", "Is it raining?", "What time is it?", "What day is it today?", "What is the news?"],
     ["I cannot know that, because I have no connection to the outside world here."]),
    (["Do you like music?", "Do you have feelings?", "Do you sleep?", "Do you eat?", "Where do you live?"],
     ["I am only a small program on your computer, so I do not do that. But I like to help."]),
    (["What is the capital of France?", "Which city is the capital of France?"], ["The capital of France is Paris."]),
    (["What is the capital of Italy?", "Which city is the capital of Italy?"], ["The capital of Italy is Rome."]),
    (["What is the capital of Germany?", "Which city is the capital of Germany?"], ["The capital of Germany is Berlin."]),
    (["What is the capital of Spain?", "Which city is the capital of Spain?"], ["The capital of Spain is Madrid."]),
    (["What is the capital of Japan?", "Which city is the capital of Japan?"], ["The capital of Japan is Tokyo."]),
    (["What is water made of?", "What is water?"], ["Water is made of hydrogen and oxygen."]),
    (["How many days are in a week?", "How many days does a week have?"], ["A week has seven days."]),
    (["How many months are in a year?", "How many months does a year have?"], ["A year has twelve months."]),
    (["Why is the sky blue?", "What makes the sky blue?"], ["Air scatters blue light more than red light, so the sky looks blue."]),
    (["What is a computer?", "Explain what a computer is."], ["A computer is a machine that follows instructions to work with data."]),
    (["What is a language model?", "How do language models work?", "What is an LLM?"], ["A language model is a program that predicts the next piece of text from the text before it."]),
]


def chat(r, split):
    turns, check = [], None
    k = r.random()
    if k < 0.3:
        h = r.choice(HI)
        ans = r.choice(["Hello! How can I help you?", "Hi! What can I do for you?"])
        turns.append((h + r.choice(["!", ".", ""]), "A greeting. I will greet back.", ans, None))
        check = {"kind": "contains", "value": "can I"}
    elif k < 0.65:
        n, extra = name(r), r.choice([("I live in {}.", place(r), "Where do I live?", "You live in {}."), ("I am a {}.", r.choice(JOBS), "What is my job?", "You are a {}."),
                                      ("I like {}.", r.choice(HOBBIES), "What do I like?", "You like {}."), ("My favourite food is {}.", r.choice(FOODS), "What is my favourite food?", "Your favourite food is {}."),
                                      ("I have a {}.", r.choice(ANIMALS), "Which animal do I have?", "You have a {}.")])
        n, v = pick(r, split, lambda: (name(r), extra[1])) if split == "train" else (n, extra[1])
        turns.append((f"{r.choice(HI)}! {r.choice(['My name is', 'I am', 'I am called', 'Call me'])} {n}. {extra[0].format(v)}", f"The user is {n}. I will greet them by name.",
                      r.choice([f"Nice to meet you, {n}! How can I help you?", f"Hello, {n}! What can I do for you?"]), None))
        for _ in range(r.choice([0, 0, 1, 2])):
            q, an = r.choice(PAIRS)
            turns.append((r.choice(q), "A simple question. I will answer it.", r.choice(an), None))
        if r.random() < 0.5:
            turns.append((r.choice(["What is my name?", "Do you remember my name?", "What was my name again?"]), f"The user said their name is {n}.", f"Your name is {n}.", None))
            check = {"kind": "contains", "value": n}
        else:
            turns.append((extra[2], f"The user told me: {extra[0].format(v)}", extra[3].format(v), None))
            check = {"kind": "contains", "value": v}
    else:
        for _ in range(r.randint(1, 3)):
            q, an = r.choice(PAIRS)
            ans = r.choice(an)
            q = r.choice(q)
            q = r.choice([q, q, q.lower(), q.rstrip(".?!")])
            turns.append((q, "A simple question. I will answer it.", ans, None))
            check = {"kind": "oneof", "value": an}
    if check["kind"] == "oneof":
        check = {"kind": "exact", "value": check["value"][0]} if len(check["value"]) == 1 else {"kind": "contains", "value": max(set.intersection(*[set(x.strip(".!?").split()) for x in check["value"]]) or {""}, key=len)}
    return {"turns": turns, "check": check, "system": r.choice(SYSTEMS)}


# ------------------------------------------------------------------ questions about ds4

DS4 = [
    (["what is {}", "what does {} do", "tell me about {}", "explain {}", "describe {}", "can you tell me what {} is"],
     "{E} is an inference engine for the DeepSeek V4 Flash model, written in Rust. It runs the model on your own computer.", ["ds4", "ds4-rs", "the ds4 engine", "this program"], "engine"),
    (["what is {}", "tell me about {}", "explain {}", "how big is {}", "describe {}"],
     "ds4-nano is a tiny model with the same architecture as DeepSeek V4 Flash and about 17 million parameters. It is built into ds4, so ds4 works without a download.", ["ds4-nano", "the nano model", "the built-in model", "the embedded model"], "million"),
    (["how do I {}", "how can I {}", "what is the command to {}", "which command do I use to {}", "I want to {}", "show me how to {}"],
     "Pass the model file with -m: ds4 -m ds4flash.gguf", ["run a real model", "run the full model", "use the big model", "run DeepSeek V4 Flash", "load a GGUF file", "choose the model file", "use my own model file", "start ds4 with a real model"], "-m"),
    (["which {} do I need", "what {} does ds4 use", "which {} should I use", "what {} should I download"],
     "Use the GGUF file of DeepSeek V4 Flash that is made for ds4, with two-bit experts, and run it with ds4 -m ds4flash.gguf", ["GGUF file", "model file", "file", "weights"], "GGUF"),
    (["how do I {}", "how can I {}", "which flag is used to {}", "what option lets me {}", "I want to {}"],
     "Use -p with the prompt: ds4 -p \"your text\"", ["give a prompt on the command line", "pass a prompt", "ask one question without the REPL", "set the prompt", "run a single prompt"], "-p"),
    (["how do I {}", "how can I {}", "which flag is used to {}", "what option lets me {}", "I want to {}"],
     "Use -n with the number of tokens: ds4 -n 200", ["limit the length of the answer", "set the number of tokens", "limit the output tokens", "make answers shorter", "set the maximum number of tokens"], "-n"),
    (["how do I {}", "how can I {}", "which flag is used to {}", "what option lets me {}", "I want to {}"],
     "Use --ctx with the number of tokens: ds4 --ctx 32768. In the REPL use /ctx N.", ["set the context size", "change the context length", "get a larger context", "use a longer context"], "--ctx"),
    (["how do I {}", "how can I {}", "which flag is used to {}", "what option lets me {}", "I want to {}"],
     "Use --temp with a number: ds4 --temp 0.7. A value of 0 always takes the most likely token.", ["set the temperature", "change the temperature", "make answers less random", "make the output deterministic", "control randomness"], "--temp"),
    (["how do I {}", "how can I {}", "which flag is used to {}", "what option lets me {}", "I want to {}"],
     "Use --think, or type /think in the REPL.", ["turn thinking on", "enable thinking", "make the model think first", "switch on reasoning", "see the reasoning"], "--think"),
    (["how do I {}", "how can I {}", "which flag is used to {}", "what option lets me {}", "I want to {}"],
     "Use --nothink, or type /nothink in the REPL.", ["turn thinking off", "disable thinking", "get answers without thinking", "switch off reasoning", "skip the reasoning"], "--nothink"),
    (["how do I {}", "how can I {}", "which flag is used to {}", "what option lets me {}", "I want to {}"],
     "Use --threads with a number: ds4 --threads 8", ["set the number of threads", "use more CPU cores", "limit the CPU threads", "choose how many cores ds4 uses"], "--threads"),
    (["how do I {}", "how can I {}", "which command is used to {}", "what command lets me {}", "I want to {}"],
     "Use ds4 inspect FILE. It prints the metadata and the tensors of the file.", ["look inside a GGUF file", "inspect a model file", "see the metadata of a file", "list the tensors of a model", "check a GGUF file"], "inspect"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "/help lists the commands of the REPL.", ["/help", "the /help command"], "commands"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "/read FILE reads a file and sends its text to the model as your message.", ["/read", "the /read command", "/read FILE"], "file"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "/ctx N sets the context size to N tokens.", ["/ctx", "the /ctx command", "/ctx N"], "context"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "/think turns thinking on, so the model reasons before it answers.", ["/think", "the /think command", "--think"], "on"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "/nothink turns thinking off, so the model answers directly.", ["/nothink", "the /nothink command", "--nothink"], "off"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "-m names the model file: ds4 -m ds4flash.gguf", ["-m", "the -m flag", "the flag -m"], "model"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "-p gives the prompt on the command line: ds4 -p \"your text\"", ["-p", "the -p flag", "the flag -p"], "prompt"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "-n sets the largest number of tokens to generate.", ["-n", "the -n flag", "the flag -n"], "tokens"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "--temp sets the sampling temperature. A value of 0 always takes the most likely token.", ["--temp", "the --temp flag", "temperature"], "temperature"),
    (["what does {} do", "what is {} for", "what is {}", "explain {}"], "--threads sets how many CPU threads ds4 uses.", ["--threads", "the --threads flag"], "threads"),
    (["what does {} do", "what is {} for", "explain {}"], "--ctx sets the context size in tokens.", ["--ctx", "the --ctx flag"], "context"),
    (["what does {} do", "what is {} for", "explain {}"], "ds4 inspect FILE prints the metadata and the tensors of a GGUF file.", ["ds4 inspect", "the inspect command", "ds4 inspect FILE"], "metadata"),
    (["how do I {}", "how can I {}", "what do I type to {}", "I want to {}"], "Type /quit in the REPL.", ["leave the REPL", "quit ds4", "exit the program", "end the session", "close ds4"], "/quit"),
    (["how do I {}", "how can I {}", "what do I press to {}", "I want to {}"], "Press Ctrl-C. It stops the answer and keeps the session.", ["stop an answer", "interrupt the model", "stop the output", "cancel generation", "stop a long answer"], "Ctrl-C"),
    (["how do I {}", "how can I {}", "what do I type to {}", "I want to {}"], "Type /read FILE in the REPL.", ["read a file in the REPL", "give the model a file", "load a text file", "ask about a file", "send a file to the model"], "/read"),
    (["how do I {}", "how can I {}", "what do I type to {}", "I want to {}"], "Type /help in the REPL.", ["see all REPL commands", "get help in the REPL", "list the commands", "find the commands"], "/help"),
    (["what is {}", "explain {}", "what does {} mean", "what is {} for"], "The KV cache keeps what the model has computed for earlier tokens, so each new token does not start from scratch. In this architecture most of it is compressed.", ["the KV cache", "a KV cache", "KV cache", "the cache"], "tokens"),
    (["what are {}", "explain {}", "what does {} mean", "how do {} work"], "Experts are small feed-forward networks inside a layer. A router picks a few of them for each token, so only part of the model runs.", ["experts", "the experts", "routed experts"], "router"),
    (["what is {}", "explain {}", "how does {} work"], "The model looks at a short window of recent tokens exactly, and at older tokens through compressed rows. An indexer picks the rows that matter.", ["compressed attention", "sparse attention", "the attention of this model"], "window"),
    (["who made {}", "who wrote {}", "where does {} come from"], "ds4-nano was trained by the ds4-rs project on text that its own scripts generate.", ["ds4-nano", "you", "this model"], "scripts"),
    (["is {}", "tell me if {}", "do you know if {}"], "Yes, ds4-rs is open source. It is under the MIT licence.", ["ds4 open source", "ds4-rs open source", "ds4 free"], "MIT"),
    (["does {}", "can {}"], "No. ds4 runs on your own computer and sends nothing away.", ["ds4 need the internet", "ds4 work with the cloud", "ds4 send my data away"], "No"),
]


def ds4(r, split):
    def draw():
        i = r.randrange(len(DS4))
        return i, r.randrange(len(DS4[i][0])), r.randrange(len(DS4[i][2]))
    i, t, s = pick(r, split, draw)
    forms, ans, subs, key = DS4[i]
    sub = subs[s]
    q = forms[t].format(sub)
    q = r.choice([q[0].upper() + q[1:], q[0].upper() + q[1:], q, "Please tell me: " + q])
    q += "." if q.lower().startswith(("tell", "explain", "show", "i want", "describe")) else r.choice(["?", "?", ""])
    ans = ans.replace("{E}", "ds4")
    return one(q, f"This is a question about ds4: {sub}. I know the answer.", ans, {"kind": "contains", "value": key}, system=r.choice(SYSTEMS))


# ------------------------------------------------------------------ numbers and dates

def add_steps(x, y):
    s, carry, i, out = [], 0, 0, []
    dx, dy = str(x)[::-1], str(y)[::-1]
    for i in range(max(len(dx), len(dy))):
        p, q = int(dx[i]) if i < len(dx) else 0, int(dy[i]) if i < len(dy) else 0
        t = p + q + carry
        s.append(f"{p} + {q}{' + 1' if carry else ''} = {t}, write {t % 10}{', carry 1' if t > 9 else ''}.")
        carry = t // 10
    return " ".join(s) + (" Write 1." if carry else "") + f" The result is {x + y}."


def sub_steps(x, y):
    s, borrow = [], 0
    dx, dy = str(x)[::-1], str(y)[::-1]
    for i in range(len(dx)):
        p, q = int(dx[i]) - borrow, int(dy[i]) if i < len(dy) else 0
        borrow = 1 if p < q else 0
        s.append(f"{dx[i]}{' - 1' if p != int(dx[i]) else ''} - {q}: {p + 10 * borrow} - {q} = {p + 10 * borrow - q}{', borrow 1' if borrow else ''}.")
    return " ".join(s) + f" The result is {x - y}."


def maths(r, split):
    k = r.choice(["add", "add", "add", "sub", "sub", "mul", "cmp", "max"])
    lim = r.choice([10, 100, 100, 1000, 1000])
    if k == "cmp":
        x, y = pick(r, split, lambda: (r.randrange(10 * lim), r.randrange(10 * lim)))
        if x == y:
            y += 1
        w = r.choice(["larger", "smaller"])
        ans = max(x, y) if w == "larger" else min(x, y)
        return one(r.choice([f"Which is {w}, {x} or {y}?", f"Which number is {w}: {x} or {y}?"]), f"Compare {x} and {y}. {max(x, y)} is larger than {min(x, y)}.", str(ans), system=r.choice(SYSTEMS))
    if k == "max":
        v = list(pick(r, split, lambda: tuple(r.sample(range(1000), r.randint(3, 5)))))
        w = r.choice(["largest", "smallest"])
        ans = max(v) if w == "largest" else min(v)
        return one(f"What is the {w} number in this list: {', '.join(map(str, v))}?", f"In order: {', '.join(map(str, sorted(v)))}. The {w} is {ans}.", str(ans), system=r.choice(SYSTEMS))
    if k == "mul":
        x, y = pick(r, split, lambda: (r.randrange(2, 13), r.randrange(2, r.choice([13, 13, 100]))))
        t, u = y // 10 * 10, y % 10
        reason = f"{x} times {y}. " + (f"{x} x {t} = {x * t}, {x} x {u} = {x * u}, {x * t} + {x * u} = {x * y}." if t and u else f"{x} x {y} = {x * y}.")
        return one(r.choice([f"What is {x} times {y}?", f"{x} * {y} = ?", f"Multiply {x} by {y}.", f"What is {x} x {y}?"]), reason, str(x * y), system=r.choice(SYSTEMS))
    x, y = pick(r, split, lambda: (r.randrange(lim), r.randrange(lim)))
    if k == "add":
        forms = [f"What is {x} + {y}?", f"{x} + {y} = ?", f"Add {x} and {y}.", f"How much is {x} plus {y}?", f"Calculate {x} + {y}.", f"{name(r)} has {x} {r.choice(FRUIT)} and gets {y} more. How many are there now?"]
        return one(r.choice(forms), add_steps(x, y), str(x + y), system=r.choice(SYSTEMS))
    x, y = max(x, y), min(x, y)
    forms = [f"What is {x} - {y}?", f"{x} - {y} = ?", f"Subtract {y} from {x}.", f"How much is {x} minus {y}?", f"{name(r)} has {x} {r.choice(FRUIT)} and gives away {y}. How many are left?"]
    return one(r.choice(forms), sub_steps(x, y), str(x - y), system=r.choice(SYSTEMS))


def dates(r, split):
    k = r.choice(["week", "week", "leap", "month", "between", "between", "after"])
    if k == "week":
        d, n = pick(r, split, lambda: (r.randrange(7), r.randrange(1, 41)))
        ans = WEEKDAYS[(d + n) % 7]
        walk = [WEEKDAYS[(d + i) % 7] for i in range(n % 7 + 1)]
        return one(r.choice([f"Today is {WEEKDAYS[d]}. Which day is it in {n} days?", f"If today is {WEEKDAYS[d]}, what day of the week is it {n} days later?", f"What weekday is {n} days after a {WEEKDAYS[d]}?"]),
                   f"{n} days is {n // 7} weeks and {n % 7} days. Counting {n % 7} from {WEEKDAYS[d]}: {', '.join(walk)}.", ans, system=r.choice(SYSTEMS))
    if k == "leap":
        y = pick(r, split, lambda: r.choice([r.randrange(1900, 2100), r.randrange(1600, 2500), r.randrange(16, 25) * 100]))
        leap = y % 4 == 0 and (y % 100 != 0 or y % 400 == 0)
        c, u = divmod(y, 100)
        reason = (f"{u} divided by 4 leaves {u % 4}, so {'it is' if leap else 'it is not'} a leap year." if u else f"{y} is a full century. {c} divided by 4 leaves {c % 4}, so {'it is' if leap else 'it is not'} a leap year.")
        return one(r.choice([f"Is {y} a leap year?", f"Was {y} a leap year?", f"Is the year {y} a leap year? Answer yes or no."]), reason, "Yes" if leap else "No", {"kind": "contains", "value": "Yes" if leap else "No"}, system=r.choice(SYSTEMS))
    if k == "month":
        m = r.randrange(12)
        y = r.choice([1999, 2001, 2003, 2005, 2007, 2009, 2011, 2013, 2015, 2017, 2019, 2021, 2023, 2025])
        m, y = pick(r, split, lambda: (r.randrange(12), r.randrange(1900, 2100) | 1))
        return one(f"How many days does {MONTHS[m]} {y} have?", f"{y} is not a leap year. {MONTHS[m]} has {DAYS[m]} days.", str(DAYS[m]), system=r.choice(SYSTEMS))
    m, x, z = pick(r, split, lambda: (r.randrange(12), r.randrange(1, 29), r.randrange(1, 29)))
    if k == "between":
        if r.random() < 0.5 and x != z:
            x, z = min(x, z), max(x, z)
            return one(f"How many days are there from {x} {MONTHS[m]} to {z} {MONTHS[m]}?", f"Same month: {z} - {x} = {z - x}.", str(z - x), system=r.choice(SYSTEMS))
        m = min(m, 10)
        n = DAYS[m] - x + z
        return one(f"How many days are there from {x} {MONTHS[m]} to {z} {MONTHS[m + 1]} 2023?", f"{MONTHS[m]} has {DAYS[m]} days. {DAYS[m]} - {x} = {DAYS[m] - x}. {DAYS[m] - x} + {z} = {n}.", str(n), system=r.choice(SYSTEMS))
    t = x + z
    ans = f"{t} {MONTHS[m]}" if t <= DAYS[m] else f"{t - DAYS[m]} {MONTHS[(m + 1) % 12]}"
    return one(f"What is the date {z} days after {x} {MONTHS[m]} 2023?", f"{x} + {z} = {t}. {MONTHS[m]} has {DAYS[m]} days. " + (f"So it is {ans}." if t <= DAYS[m] else f"{t} - {DAYS[m]} = {t - DAYS[m]}, so it is {ans}."), ans, system=r.choice(SYSTEMS))


# ------------------------------------------------------------------ tools

def schema(nm, desc, props, required):
    return {"name": nm, "description": desc, "parameters": {"type": "object", "properties": props, "required": required}}


def P(t, d, **kw):
    return {"type": t, "description": d, **kw}


def tool_case(r):
    """(schema, request, arguments, result, answer)"""
    k = r.randrange(11)
    if k == 0:
        c, u = place(r), r.choice(["celsius", "fahrenheit"])
        t, w = r.randrange(-10, 38), r.choice(WEATHER)
        nm = r.choice(["get_weather", "weather", "current_weather", "weather_lookup"])
        key = r.choice(["city", "location", "place"])
        two = r.random() < 0.4
        sc = schema(nm, "Get the current weather.", {key: P("string", "Name of the city"), **({"unit": P("string", "Unit", enum=["celsius", "fahrenheit"])} if two else {})}, [key])
        return (sc, r.choice([f"What is the weather in {c}", f"How is the weather in {c} today", f"Tell me the weather in {c}"]) + (f" in {u}?" if two else "?"),
                {key: c, **({"unit": u} if two else {})}, {"temperature": t, "condition": w}, f"It is {w} in {c}, with {t} degrees.")
    if k == 1:
        x, y, op = r.randrange(1, 9999), r.randrange(1, 9999), r.choice("+-*")
        res = x + y if op == "+" else x - y if op == "-" else x * y
        nm, key = r.choice(["calculator", "calculate", "eval_math", "compute"]), r.choice(["expression", "expr", "formula"])
        return (schema(nm, "Evaluate an arithmetic expression.", {key: P("string", "Expression to evaluate")}, [key]), r.choice([f"What is {x} {op} {y}?", f"Calculate {x} {op} {y}.", f"Use the calculator: {x} {op} {y}"]),
                {key: f"{x} {op} {y}"}, {"result": res}, f"{x} {op} {y} = {res}")
    if k == 2:
        q = r.choice([f"{r.choice(COLOURS)} {r.choice(THINGS)}", f"{r.choice(FOODS)} in {place(r)}", f"{r.choice(HOBBIES)} for beginners", f"history of {place(r)}"])
        n = r.randint(1, 10)
        nm, key = r.choice(["search", "web_search", "search_web", "find_pages"]), r.choice(["query", "q", "text"])
        title = f"{r.choice(ADJ).capitalize()} guide to {q}"
        two = r.random() < 0.5
        return (schema(nm, "Search the web.", {key: P("string", "Search text"), **({"limit": P("integer", "Number of results")} if two else {})}, [key]), (f"Search for {q} and give me {n} results." if two else r.choice([f"Search for {q}.", f"Look up {q}.", f"Find pages about {q}."])),
                {key: q, **({"limit": n} if two else {})}, {"results": [{"title": title}]}, f"I found this: {title}.")
    if k == 3:
        f = f"{r.choice(['', 'docs/', 'src/', 'data/', 'notes/'])}{r.choice([noun(r), made_up(r)])}.{r.choice(['txt', 'md', 'py', 'rs', 'json', 'csv'])}"
        nm, key = r.choice(["read_file", "open_file", "cat", "file_read"]), r.choice(["path", "file", "filename"])
        body = f"The {r.choice(COLOURS)} {r.choice(THINGS)} belongs to {name(r)}."
        return schema(nm, "Read a text file.", {key: P("string", "Path of the file")}, [key]), r.choice([f"Read the file {f}.", f"What does {f} say?", f"Show me {f}.", f"Open {f} please."]), {key: f}, body, f"The file says: {body}"
    if k == 4:
        f = f"{made_up(r)}.{r.choice(['txt', 'md'])}"
        body = r.choice([f"Meet {name(r)} at {r.randint(1, 12)}.", f"Buy {r.choice(FRUIT)} and {r.choice(FOODS)}.", f"Call {name(r)}."])
        nm = r.choice(["write_file", "save_file", "create_file"])
        return (schema(nm, "Write text to a file.", {"path": P("string", "Path"), "content": P("string", "Text to write"), "append": P("boolean", "Append instead of replace")}, ["path", "content", "append"]),
                *(lambda ap: (f'{"Append" if ap else "Write"} "{body}" to {f}.', {"path": f, "content": body, "append": ap}))(r.random() < 0.5), "ok", f"Done. I saved it to {f}.")
    if k == 5:
        t, d, h = r.choice(["Meeting", "Lunch", "Call", "Dinner", "Visit"]) + " with " + name(r), r.choice(WEEKDAYS), r.randint(8, 20)
        nm = r.choice(["add_event", "create_event", "calendar_add"])
        return schema(nm, "Add an event to the calendar.", {"title": P("string", "Title"), "day": P("string", "Weekday"), "hour": P("integer", "Hour")}, ["title", "day", "hour"]), r.choice([f"Add to my calendar: {t} on {d} at {h}.", f"Put {t} in the calendar for {d} at {h} o'clock."]), {"title": t, "day": d, "hour": h}, {"status": "created"}, f"I added {t} on {d} at {h}."
    if k == 6:
        x = r.choice([r.randrange(1, 500), r.randrange(1, 100) / 2])
        u, v = r.choice([("km", "miles"), ("kg", "pounds"), ("metres", "feet"), ("litres", "gallons"), ("cm", "inches")])
        res = round(x * r.choice([0.62, 2.2, 3.28]), 1)
        nm = r.choice(["convert_units", "convert", "unit_convert"])
        return schema(nm, "Convert between units.", {"value": P("number", "Amount"), "from": P("string", "From unit"), "to": P("string", "To unit")}, ["value", "from", "to"]), r.choice([f"Convert {x} {u} to {v}.", f"How many {v} are {x} {u}?"]), ({"value": x, "from": u, "to": v}), {"result": res}, f"{x} {u} are {res} {v}."
    if k == 7:
        i = r.randrange(100, 99999)
        tb = r.choice(["users", "orders", "products", "customers"])
        n = name(r)
        nm = r.choice(["db_lookup", "get_record", "lookup", "fetch_row"])
        return schema(nm, "Look up a record.", {"table": P("string", "Table"), "id": P("integer", "Record id")}, ["table", "id"]), r.choice([f"Look up record {i} in the table {tb}.", f"Who is in {tb} with id {i}?", f"Get id {i} from {tb}."]), {"table": tb, "id": i}, {"id": i, "name": n}, f"Record {i} is {n}."
    if k == 8:
        v = [r.randrange(100) for _ in range(r.randint(3, 6))]
        nm = r.choice(["mean", "sum_list", "sort_numbers", "statistics"])
        key = r.choice(["values", "numbers", "data"])
        res = sum(v) if nm == "sum_list" else sorted(v) if nm == "sort_numbers" else round(sum(v) / len(v), 1)
        return schema(nm, "Work on a list of numbers.", {key: P("array", "Numbers", items={"type": "number"})}, [key]), f"Use {nm} on {', '.join(map(str, v))}.", {key: v}, {"result": res}, f"The result is {res}."
    if k == 9:
        n, m = name(r), r.choice([f"I will be late by {r.randint(5, 50)} minutes.", f"Please bring the {r.choice(THINGS)}.", f"See you in {place(r)}.", "Call me back."])
        nm = r.choice(["send_message", "send_mail", "notify"])
        return schema(nm, "Send a message.", {"to": P("string", "Recipient"), "text": P("string", "Message")}, ["to", "text"]), f'Send {n} this message: "{m}"', {"to": n, "text": m}, {"sent": True}, f"I sent the message to {n}."
    verb, obj = made_up(r, 2), made_up(r, 2)
    keys = r.sample(COLUMNS + [made_up(r, 2) for _ in range(4)], r.randint(1, 3))
    props, args, words = {}, {}, []
    for q in keys:
        t = r.choice(["string", "integer", "boolean"])
        v = noun(r) if t == "string" else r.randrange(1000) if t == "integer" else r.random() < 0.5
        props[q], args[q] = P(t, f"The {q}"), v
        words.append(f"{q} {json.dumps(v) if t != 'string' else v}")
    res = made_up(r)
    return schema(f"{verb}_{obj}", f"{verb.capitalize()} the {obj}.", props, keys), r.choice([f"Please {verb} the {obj} with {' and '.join(words)}.", f"{verb.capitalize()} the {obj}: {', '.join(words)}."]), args, {"result": res}, f"The result is {res}."


def tools(r, split, stage=None):
    import json as j
    while True:
        cases = [tool_case(r) for _ in range(r.choice([1, 2, 2, 3, 4]))]
        seen, uniq = set(), []
        for c in cases:
            if c[0]["name"] not in seen:
                seen.add(c[0]["name"])
                uniq.append(c)
        if held(uniq[0][1]) == (split == "eval"):
            break
    sc, req, args, res, ans = uniq[0]
    order = uniq[:]
    r.shuffle(order)
    conv = {"system": r.choice(SYSTEMS), "tools": [c[0] for c in order]}
    k = stage or r.choice(["call", "full", "full", "full", "full", "none", "parallel", "parallel"])
    call = {"name": sc["name"], "arguments": args}
    txt = lambda v: v if isinstance(v, str) else j.dumps(v, ensure_ascii=False)
    if k == "none":
        qs, an = r.choice(PAIRS[:10] + PAIRS[12:])
        q, an = r.choice(qs), r.choice(an)
        conv.update(turns=[(q, "No tool is needed for this. I answer directly.", an, None)], check={"kind": "no_tool"})
        conv["check"] = {"kind": "contains", "value": max(an.strip("?!.").split(), key=len).strip(".,!?")}
        return conv
    if k == "parallel" and len(uniq) > 1:
        b = uniq[1]
        calls = [call, {"name": b[0]["name"], "arguments": b[2]}]
        t1 = (f"{req} {b[1]}", f"I need two tools: {calls[0]['name']} and {calls[1]['name']}.", "", calls)
        conv["turns"] = [t1]
        conv["check"] = {"kind": "tool_call", "calls": calls}
        if split == "train":
            conv["turns"].append(([txt(res), txt(b[3])], "I have both results and can answer.", f"{ans} {b[4]}", None))
        return conv
    conv["turns"] = [(req, f"The user needs {sc['name']}. I call it with {', '.join(args)}.", "", [call])]
    conv["check"] = {"kind": "tool_call", "calls": [call]}
    if k == "answer" or (split == "train" and k != "call"):
        conv["turns"].append(([txt(res)], "The tool gave a result. I can answer now.", ans, None))
        conv["check"] = {"kind": "exact", "value": ans}
        if split == "train" and r.random() < 0.3 and len(uniq) > 1:
            b = uniq[1]
            conv["turns"] += [(b[1], f"The user needs {b[0]['name']}. I call it with {', '.join(b[2])}.", "", [{"name": b[0]["name"], "arguments": b[2]}]),
                              ([txt(b[3])], "The tool gave a result. I can answer now.", b[4], None)]
    return conv


def tool_answer(r, split):
    return tools(r, split, "answer" if split == "eval" else None)


# ------------------------------------------------------------------ JSON extraction

def extract(r, split):
    def draw():
        n, ag, c, jb, h = name(r), r.randrange(18, 90), place(r), r.choice(JOBS), r.choice(HOBBIES)
        it, pr, q = r.choice(COLOURS) + " " + r.choice(THINGS), r.randrange(1, 500), r.randrange(1, 60)
        return n, ag, c, jb, h, it, pr, q
    n, ag, c, jb, h, it, pr, q = pick(r, split, draw)
    d, ph = r.choice(WEEKDAYS), "".join(r.choice("0123456789") for _ in range(6))
    person = r.random() < 0.5
    if person:
        facts = {"name": n, "age": ag, "city": c, "job": jb, "hobby": h, "phone": ph}
        s = [r.choice([f"{n} is {ag} years old.", f"{n}, aged {ag}, wrote to us."]), r.choice([f"{n} lives in {c}.", f"The address is in {c}."]), r.choice([f"The job is {jb}.", f"{n} works as {a(jb)}."]),
             f"{n} likes {h}.", f"The phone number is {ph}."]
    else:
        facts = {"customer": n, "item": it, "price": pr, "quantity": q, "city": c, "day": d}
        s = [r.choice([f"{n} ordered {q} pieces of the {it}.", f"Order from {n}: {q} times the {it}."]), r.choice([f"Each costs {pr} euros.", f"The price is {pr} euros."]), r.choice([f"Send it to {c}.", f"Deliver to {c}."]), r.choice([f"It should arrive on {d}.", f"Delivery is on {d}."])]
    r.shuffle(s) if not person else None
    keys = r.sample(list(facts), r.randint(2, min(5, len(facts))))
    out = {k: facts[k] for k in keys}
    ask = r.choice(["Extract {} as JSON:", "Give me {} from this text as JSON:", "Return a JSON object with the keys {}:", "Read the text and output JSON with {}:"]).format(", ".join(keys))
    text = " ".join(s)
    return one(r.choice([f"{ask}\n{text}", f"{text}\n\n{ask.rstrip(':')}."]), "I look for each key: " + ", ".join(f"{k} is {v}" for k, v in out.items()) + ".", json.dumps(out), {"kind": "json", "value": out}, system=r.choice(SYSTEMS))


# ------------------------------------------------------------------ files

def files(r, split):
    kind = r.choice(["ini", "csv", "list", "py"])
    while True:
        keys = r.sample(COLUMNS + ["host", "port", "user", "timeout", "path", "mode", "theme", "volume", "speed", "limit", "debug", "cache"] + [made_up(r, 2) for _ in range(3)], r.randint(3, 7))
        vals = [r.choice([str(r.randrange(1, 9999)), noun(r), r.choice(COLOURS), made_up(r), r.choice(["true", "false"])]) for _ in keys]
        if held((keys[0], vals[0])) == (split == "eval"):
            break
    i = r.randrange(len(keys))
    if kind == "ini":
        fn, line = "config.ini", lambda k, v: f"{k} = {v}"
    elif kind == "py":
        fn, line = "settings.py", lambda k, v: f"{k.upper()} = {v if v.isdigit() else repr(v)}"
    elif kind == "csv":
        fn, line = "data.csv", lambda k, v: f"{k},{v}"
    else:
        fn, line = "notes.txt", lambda k, v: f"- {k}: {v}"
    if r.random() < 0.5:
        fn = made_up(r) + fn[fn.index("."):]
    lines = [line(k, v) for k, v in zip(keys, vals)]
    body = "\n".join(lines)
    head = r.choice([f"File {fn}:\n```\n{body}\n```\n", f"Here is {fn}:\n\n{body}\n\n", f"{fn}\n---\n{body}\n---\n"])
    shown = keys[i].upper() if kind == "py" else keys[i]
    t = r.choice(["value", "value", "replace", "edit", "edit", "count", "first", "add", "delete"])
    if t == "value":
        return one(head + r.choice([f"What is the value of {shown}?", f"What is {shown} set to?", f"Which value does {shown} have?"]), f"The line is: {lines[i]}", vals[i], system=r.choice(SYSTEMS))
    if t == "count":
        return one(head + "How many lines does the file have?", f"The lines are: {', '.join(keys)}. That is {len(keys)}.", str(len(keys)), system=r.choice(SYSTEMS))
    if t == "first":
        w = r.choice(["first", "last"])
        return one(head + f"What is the {w} line of the file?", f"The {w} line is wanted.", lines[0] if w == "first" else lines[-1], system=r.choice(SYSTEMS))
    new = r.choice([str(r.randrange(1, 9999)), noun(r), made_up(r)])
    nl = line(keys[i], new)
    if t == "replace":
        return one(head + f"Set {shown} to {new}. Output only the changed line.", f"The old line is: {lines[i]}", nl, system=r.choice(SYSTEMS))
    if t == "add":
        k2 = made_up(r, 2)
        return one(head + f"Add a line for {k2.upper() if kind == 'py' else k2} with the value {new} at the end. Output the whole file.", "I copy the file and add one line.", "\n".join(lines + [line(k2, new)]), system=r.choice(SYSTEMS))
    if t == "delete":
        return one(head + f"Remove the line with {shown}. Output the whole file.", f"I copy the file without: {lines[i]}", "\n".join(lines[:i] + lines[i + 1:]), system=r.choice(SYSTEMS))
    return one(head + f"Change {shown} to {new} and output the whole file.", f"The new line is: {nl}", "\n".join(lines[:i] + [nl] + lines[i + 1:]), system=r.choice(SYSTEMS))


# ------------------------------------------------------------------ lists and instructions

def lists(r, split):
    n = r.randint(3, 7)
    src = r.choice([NAMES, FRUIT, ANIMALS, PLACES, COLOURS, None, None])
    w = list(pick(r, split, lambda: tuple(r.sample(src, n) if src else (made_up(r) for _ in range(n)))))
    t = ", ".join(w)
    k = r.choice(["count", "sort", "reverse", "copy", "first", "last", "upper", "json", "oneword", "nth", "sortnum", "contains"])
    S = dict(system=r.choice(SYSTEMS))
    if k == "count":
        return one(f"How many items are in this list: {t}?", " ".join(f"{i + 1} {x}" for i, x in enumerate(w)) + ".", str(n), **S)
    if k == "sort":
        o = ", ".join(sorted(w, key=str.lower))
        return one(r.choice([f"Sort these words alphabetically: {t}", f"Put in alphabetical order: {t}"]), "First letters: " + ", ".join(sorted(x[0].lower() for x in w)) + ".", o, **S)
    if k == "reverse":
        return one(r.choice([f"Reverse this list: {t}", f"Write this list backwards: {t}"]), f"The last item is {w[-1]}, so I start with it.", ", ".join(w[::-1]), **S)
    if k == "copy":
        return one(r.choice([f"Repeat after me: {t}", f"Copy this exactly: {t}", f"Say exactly this: {t}"]), "I repeat the text.", t, **S)
    if k in ("first", "last"):
        v = w[0] if k == "first" else w[-1]
        return one(f"What is the {k} word in this list: {t}?", f"The {k} word is {v}.", v, **S)
    if k == "nth":
        i = r.randrange(min(n, 5))
        return one(f"What is the {['first', 'second', 'third', 'fourth', 'fifth'][i]} word in this list: {t}?", " ".join(f"{q + 1} {x}" for q, x in enumerate(w[:i + 1])) + ".", w[i], **S)
    if k == "upper":
        return one(r.choice([f"Write this in upper case: {t}", f"Turn into capital letters: {t}"]), "I write every letter as a capital.", t.upper(), **S)
    if k == "json":
        return one(f"Write this list as a JSON array: {t}", "Each word becomes a string.", json.dumps(w), {"kind": "json", "value": w}, **S)
    if k == "oneword":
        x, c = name(r), r.choice(COLOURS)
        v = r.choice(THINGS)
        return one(f"{x} has a {c} {v}. What colour is the {v}? Answer in one word.", f"The {v} is {c}.", c, **S)
    if k == "contains":
        x = r.choice(w) if r.random() < 0.5 else (r.choice(src) if src else made_up(r))
        return one(f"Is {x} in this list: {t}? Answer yes or no.", f"I look for {x}: {'it is there' if x in w else 'it is not there'}.", "Yes" if x in w else "No", **S)
    v = [r.randrange(1000) for _ in range(n)]
    d = r.random() < 0.5
    return one(f"Sort these numbers from {'largest to smallest' if d else 'smallest to largest'}: {', '.join(map(str, v))}", f"The {'largest' if d else 'smallest'} is {max(v) if d else min(v)}.", ", ".join(map(str, sorted(v, reverse=d))), **S)


# ------------------------------------------------------------------ recall

def needle(r, split):
    """(sentence, question, answer): a fact that cannot be guessed."""
    def draw():
        return r.randrange(6), r.choice(COLOURS + ADJ[:40]), r.choice(SITES), r.choice(CODES)
    k, c, s, code = pick(r, split, draw)
    num = str(r.randrange(1000, 10000))
    if k <= 2:
        return f"The access {code} of the {c} {s} is {num}.", f"What is the access {code} of the {c} {s}?", num
    if k == 3:
        n, t = name(r), r.choice(THINGS)
        return f"{n} hid the {c} {t} in the {s}.", f"Where did {n} hide the {c} {t}?", f"In the {s}"
    if k == 4:
        n = name(r)
        return f"The owner of the {c} {s} is {n}.", f"Who is the owner of the {c} {s}?", n
    w = made_up(r)
    return f"The secret word of the {c} {s} is {w}.", f"What is the secret word of the {c} {s}?", w


def filler(r):
    k = r.random()
    if k < 0.6:
        return story_text(r)
    if k < 0.8:
        return " ".join(f"{name(r)} {r.choice(VERBS)} {a(r.choice(ADJ))} {r.choice(THINGS)} near the {r.choice(NATURE)}." for _ in range(r.randint(2, 6)))
    return " ".join(f"It was {r.choice(WEATHER)} in {place(r)} on {r.choice(WEEKDAYS)}." if r.random() < 0.5 else f"The {r.choice(JOBS)} likes {r.choice(FOODS)} and {r.choice(HOBBIES)}." for _ in range(r.randint(2, 6)))


def recall(r, split, length=300):
    """length is in words of filler, roughly; several facts, questions about some of them."""
    parts, n = [], 0
    while n < length:
        parts.append(filler(r))
        n += len(parts[-1].split())
    facts, seen = [], set()
    for i in range(r.randint(1, 4) if length < 1000 else r.randint(3, 12)):
        f = needle(r, split if i == 0 else r.choice(["train", "train"]) if split == "train" else "eval")
        if f[1] not in seen:
            seen.add(f[1])
            facts.append(f)
    for f in facts:
        parts.insert(r.randint(0, len(parts)), f[0])
    sep = r.choice([" ", "\n", "\n\n"])
    text = sep.join(parts)
    intro = r.choice(["Read this text and answer the question.\n\n", "Remember the facts in this text.\n\n", "", "Here are some notes.\n\n"])
    asked = facts[:1] + [f for f in facts[1:] if split == "train" and r.random() < 0.7]
    r.shuffle(asked) if split == "train" else None
    turns = [((intro + text + "\n\n" if i == 0 else "") + f[1], f"The text says: {f[0]}", f[2] + r.choice([""]), None) for i, f in enumerate(asked)]
    return {"turns": turns, "check": {"kind": "contains", "value": asked[-1][2].replace("In the ", "")}, "system": r.choice(SYSTEMS[:5])}


SKILLS = {"story": story, "chat": chat, "ds4": ds4, "maths": maths, "dates": dates, "tools": tools, "tool_answer": tool_answer,
          "extract": extract, "files": files, "lists": lists, "recall": recall}
# share of documents in short sequences (documents differ in length, so token shares differ)
MIX = {"story": 5, "chat": 9, "ds4": 11, "maths": 24, "dates": 10, "tools": 13, "tool_answer": 6, "extract": 9, "files": 11, "lists": 16, "recall": 14}
