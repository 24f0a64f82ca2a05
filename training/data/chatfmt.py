"""The prompt format: conversations as (text, weight) pieces that meet only at marker tokens."""
import json

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, ETHINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
D = "｜DSML｜"
BEFORE = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<{D}tool_calls>" block like the following:

<{D}tool_calls>
<{D}invoke name="$TOOL_NAME">
<{D}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{D}parameter>
...
</{D}invoke>
<{D}invoke name="$TOOL_NAME2">
...
</{D}invoke>
</{D}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
AFTER = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


def js(v):
    return json.dumps(v, ensure_ascii=False)


def calls_text(calls):
    out = f"\n\n<{D}tool_calls>\n"
    for c in calls:
        out += f'<{D}invoke name="{c["name"]}">\n'
        for k, v in c["arguments"].items():
            s = isinstance(v, str)
            out += f'<{D}parameter name="{k}" string="{"true" if s else "false"}">{v if s else js(v)}</{D}parameter>\n'
        if not c["arguments"]:
            out += "\n"
        out += f"</{D}invoke>\n"
    return out + f"</{D}tool_calls>"


def render(conv, think, prompt_only=False):
    """conv: system, tools, turns = [(user text or results, reasoning, answer, calls)].  Returns [(text, is_answer)]."""
    pieces, text = [], BOS + conv.get("system", "")
    tools = conv.get("tools")
    if tools:
        text += "\n\n" + BEFORE + "\n".join(js(t) for t in tools) + AFTER
    turns = conv["turns"]
    for i, (user, reason, answer, calls) in enumerate(turns):
        if isinstance(user, list):
            user = "\n\n".join(f"<tool_result>{u}</tool_result>" for u in user)
        last = i == len(turns) - 1
        open_think = think and (tools or last)
        text += USER + user + ASSISTANT + (THINK if open_think else ETHINK)
        if last and prompt_only:
            return text
        out = (reason + ETHINK if open_think else "") + answer + (calls_text(calls) if calls else "") + EOS
        pieces += [(text, False), (out, True)]
        text = ""
    return pieces
