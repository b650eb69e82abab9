"""Make a picture of the page: serve an index, ask about a word, and photograph what Chromium shows.

python -m bench.screenshot INDEX PROMPT ANSWER WORD [FILE.png]
"""

import shutil
import subprocess
import sys

from playwright.sync_api import sync_playwright

PORT = "8973"
SIZE = {"width": 1120, "height": 720}


def photograph(url: str, prompt: str, answer: str, word: str, file: str) -> None:
    """Ask about `word` on the page at `url`, wait for everything, put the pointer on the first match, and write."""
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(url)
        page.get_by_text("Ready.").wait_for(timeout=300_000)
        page.get_by_role("textbox", name="Prompt", exact=True).fill(prompt)
        page.get_by_text("Type or paste the answer").click()
        page.get_by_label("Answer to explain").fill(answer)
        page.get_by_role("button", name="Use this answer").click()
        page.get_by_role("option", name=word).first.click()
        page.get_by_text("complete.").wait_for(timeout=600_000)
        page.get_by_text("Type or paste the answer").click()
        if not page.locator(".match").first.is_visible():  # none is beyond chance
            page.locator("#list > details > summary").click()
            page.get_by_text("complete.").wait_for(timeout=600_000)
        page.locator(".match").first.hover()
        page.screenshot(path=file)
        browser.close()


def main(index: str, prompt: str, answer: str, word: str, file: str = "docs/page.png") -> None:
    """Serve the index while its page is photographed."""
    command = [sys.executable, "-m", "rapidindex", "serve", index, "--port", PORT]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            photograph(server.stderr.readline().split()[-1], prompt, answer, word, file)
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
