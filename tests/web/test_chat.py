"""Talking: type, stream, stop, reload, edit, regenerate, branches."""

import re

from playwright.sync_api import expect


def test_a_question_is_answered_while_one_watches(page, server, reply, say):
    server.replies["Hello"] = reply("One two three **four** five six seven eight nine ten.", pause=0.05, size=4)
    answer = say(page, "Hello", wait=False)
    expect(answer.locator(".prose").last).to_contain_text("One")
    assert "ten." not in answer.inner_text()
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    expect(answer.locator("strong")).to_have_text("four")
    expect(answer.locator(".prose").last).to_contain_text("ten.")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    assert re.search(r"tiny\s+·\s+\d+ tokens\s+·\s+[\d.]+ tokens/s\s+·\s+first after \d+ ms", answer.locator(".numbers").inner_text())


def test_shift_enter_breaks_the_line_and_enter_sends(page, server):
    page.click("#message")
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .bubble-text")).to_have_text("first\nsecond")
    expect(page.locator("article.assistant .numbers")).to_be_visible()
    assert server.requests[0]["messages"] == [{"role": "user", "content": "first\nsecond"}]


def test_stop_keeps_what_was_written_and_closes_the_connection(page, server, reply, say):
    server.replies["Go on"] = reply("word " * 400, pause=0.02, size=5)
    answer = say(page, "Go on", wait=False)
    expect(answer.locator(".prose").last).to_contain_text("word word word")
    page.keyboard.press("Escape")
    expect(answer.locator(".quiet-notice")).to_have_text("Stopped.")
    expect(answer.locator(".prose").last).to_contain_text("word")
    page.wait_for_timeout(300)
    assert server.closed == 1
    server.replies["Go on"] = reply("short")
    say(page, "And now?")
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]


def test_a_reload_finds_the_conversation_again(page, server, reply, say):
    server.replies["Remember me"] = reply("Answer 1 to: Remember me", pause=0.05)
    say(page, "Remember me")
    page.reload()
    expect(page.locator("article.user .bubble-text")).to_have_text("Remember me")
    expect(page.locator("article.assistant .prose").last).to_have_text("Answer 1 to: Remember me")
    expect(page.locator(".entry.here .entry-open")).to_have_text("Remember me")
    expect(page.locator("article.assistant .numbers")).to_contain_text("tokens/s")


def test_a_reload_in_the_middle_keeps_what_was_there(page, server, reply, say):
    server.replies["Long"] = reply("word " * 400, pause=0.02, size=5)
    answer = say(page, "Long", wait=False)
    page.wait_for_timeout(1600)
    assert "word" in answer.inner_text()
    page.reload()
    expect(page.locator("article.assistant .prose").last).to_contain_text("word word")
    expect(page.locator("article.assistant .quiet-notice")).to_contain_text("The page was left")


def test_an_edited_question_becomes_a_branch(page, server, say):
    say(page, "First")
    say(page, "Second")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_label("Edit message").click()
    area = page.locator("form.edit textarea")
    expect(area).to_have_value("First")
    area.fill("First, otherwise")
    area.press("Enter")
    expect(page.locator("article.assistant .prose").last).to_have_text("Answer 3 to: First, otherwise")
    expect(page.locator("article.user")).to_have_count(1)
    assert server.requests[2]["messages"] == [{"role": "user", "content": "First, otherwise"}]
    branches = page.locator("article.user .branches")
    expect(branches).to_have_text("2 / 2")
    branches.get_by_label("Previous branch").click()
    expect(page.locator("article.user .bubble-text")).to_have_text(["First", "Second"])
    page.reload()
    expect(page.locator("article.user .bubble-text")).to_have_text(["First", "Second"])


def test_regenerate_gives_a_second_answer_beside_the_first(page, server, say):
    answer = say(page, "Again")
    answer.get_by_label("Regenerate").click()
    expect(page.locator("article.assistant .prose").last).to_have_text("Answer 2 to: Again")
    branches = page.locator("article.assistant .branches")
    expect(branches).to_have_text("2 / 2")
    expect(branches.get_by_label("Next branch")).to_be_disabled()
    branches.get_by_label("Previous branch").click()
    expect(page.locator("article.assistant .prose").last).to_have_text("Answer 1 to: Again")
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    say(page, "Going on")
    assert server.requests[2]["messages"][1]["content"] == "Answer 1 to: Again"


def test_escape_leaves_an_edit_as_it_was(page, say):
    say(page, "Stay")
    page.press("#message", "ArrowUp")
    page.locator("form.edit textarea").fill("changed")
    page.keyboard.press("Escape")
    expect(page.locator("form.edit")).to_have_count(0)
    expect(page.locator("article.user .bubble-text")).to_have_text("Stay")


def test_thinking_is_folded_and_tells_its_time(page, server, reply, say):
    server.replies["Why?"] = reply("Because.", reasoning="First I *weigh* it. " * 6, pause=0.02)
    answer = say(page, "Why?", wait=False)
    expect(answer.locator(".thinking summary")).to_contain_text("Thinking")
    expect(answer.locator(".numbers")).to_be_visible()
    expect(answer.locator(".thinking summary")).to_contain_text("Thought for")
    expect(answer.locator(".thoughts")).not_to_be_visible()
    answer.locator(".thinking summary").click()
    expect(answer.locator(".thoughts em").first).to_have_text("weigh")
    say(page, "And?")
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "Because."}


def test_a_tool_call_is_shown_and_its_result_goes_back(page, server, reply, say):
    server.replies["Weather"] = reply(tool_calls=[{"id": "call_1", "name": "weather", "arguments": '{"city": "Berlin"}'}])
    server.replies["12 degrees"] = "It is cool."
    answer = say(page, "Weather")
    expect(answer.locator(".call summary")).to_have_text("weather")
    expect(answer.locator(".call pre")).to_have_text('{\n  "city": "Berlin"\n}')
    answer.get_by_label("Result of weather").fill("12 degrees")
    answer.get_by_role("button", name="Send result").click()
    expect(page.locator("article.assistant .prose").last).to_have_text("It is cool.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Berlin"}'}}
    assert server.requests[1]["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]


def test_two_conversations_answer_at_once(page, server, reply, say):
    server.replies["Slow"] = reply("slow " * 30, pause=0.05, size=5)
    say(page, "Slow", wait=False)
    page.keyboard.press("Control+k")
    expect(page.locator("#welcome")).to_be_visible()
    say(page, "Quick")
    page.locator(".entry-open", has_text="Slow").click()
    expect(page.locator("article.assistant .numbers")).to_be_visible()
    assert page.locator("article.assistant .prose").last.inner_text().count("slow") == 30


def test_a_suggestion_is_a_message(page, server):
    page.locator("#suggestions button").first.click()
    expect(page.locator("article.assistant .numbers")).to_be_visible()
    assert server.requests[0]["messages"][0]["content"] == page.locator("article.user .bubble-text").inner_text()
