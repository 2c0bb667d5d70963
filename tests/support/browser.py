"""A real browser without a screen: the Chromium in Qt WebEngine, which comes as wheels (``pip
install pyqt6-webengine``).

Run as a script it opens an empty page and says whether that works here; a browser that lacks a
system library may take the whole process down, hence :func:`reason_to_skip` asks in another one.
"""

import functools
import json
import os
import subprocess
import sys
import time

FLAGS = "--no-sandbox --disable-gpu --disable-dev-shm-usage --force-prefers-reduced-motion"

PATIENCE = 240  # seconds; a page is there in two, unless the machine is very busy


@functools.cache
def reason_to_skip():
    """Why there is no browser here, or None."""
    try:
        import PyQt6.QtWebEngineCore  # noqa: F401
    except ImportError as error:
        return f"no browser: {error} (pip install pyqt6-webengine)"
    try:
        ran = subprocess.run(
            [sys.executable, __file__],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the browser does not start within {PATIENCE} s"
    return (
        None if ran.returncode == 0 else f"the browser does not start: {ran.stderr.strip()[-500:]}"
    )


@functools.cache
def application():
    """Qt's application, one for the whole process: a second one after the first is gone takes the
    process down.
    """
    from PyQt6 import QtWebEngineWidgets  # noqa: F401 it must be loaded before the application is made
    from PyQt6.QtWidgets import QApplication

    return QApplication.instance() or QApplication([sys.argv[0]])


class Browser:
    """One page of a given size, with its log in ``console`` and its loads in ``requests``."""

    def __init__(self, width=1200, height=900):
        os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
        os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", FLAGS)
        os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")
        from PyQt6.QtWebEngineCore import (
            QWebEnginePage,
            QWebEngineProfile,
            QWebEngineUrlRequestInterceptor,
        )
        from PyQt6.QtWebEngineWidgets import QWebEngineView

        self.console, self.requests = [], []
        self.app = application()

        class Interceptor(QWebEngineUrlRequestInterceptor):
            def interceptRequest(_, info):  # noqa: N802, N805
                self.requests.append(info.requestUrl().toString())

        class Page(QWebEnginePage):
            def javaScriptConsoleMessage(_, level, message, line, source):  # noqa: N802, N805
                self.console.append(f"{level.name}: {message} ({line})")

        self.profile, self.interceptor, self.view = (
            QWebEngineProfile(),
            Interceptor(),
            QWebEngineView(),
        )
        self.profile.setUrlRequestInterceptor(self.interceptor)
        self.page = Page(self.profile, self.view)
        self.view.setPage(self.page)
        self.view.resize(width, height)
        self.view.show()
        self.view.activateWindow()
        self.view.setFocus()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        from PyQt6 import sip

        for thing in (self.view, self.page, self.profile):  # a page must not outlive its profile
            if not sip.isdeleted(thing):
                sip.delete(thing)

    def wait(self, done, what, seconds=PATIENCE):
        """Let the browser work until ``done()``."""
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"the browser did not {what} within {seconds} s; its console: {self.console}"
                )
            self.app.processEvents()
            time.sleep(0.005)

    def open(self, file):
        from PyQt6.QtCore import QUrl

        loaded = []
        self.page.loadFinished.connect(loaded.append)
        self.view.load(QUrl.fromLocalFile(str(file)) if file else QUrl("about:blank"))
        self.wait(lambda: loaded, f"load {file}")
        assert loaded == [True]
        return self

    def run(self, script):
        """Value of a JavaScript expression; an exception in it fails."""
        found = []
        wrapped = f"(() => {{ try {{ return JSON.stringify([{script}]) }}"
        wrapped += " catch (e) { return String(e) } })()"
        self.page.runJavaScript(wrapped, found.append)
        self.wait(lambda: found, f"run {script}")
        assert found[0].startswith("["), f"{script}: {found[0]}"
        return json.loads(found[0])[0]

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, selector):
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def until(self, script):
        """Wait for a JavaScript expression to be true."""
        self.wait(lambda: self.run(f"Boolean({script})"), f"reach {script}")

    def _input(self):
        return self.view.focusProxy() or self.view

    def click(self, selector):
        """A real mouse click in the middle of an element, once it is there to be seen."""
        from PyQt6.QtCore import QPoint, Qt
        from PyQt6.QtTest import QTest

        self.until(f"document.querySelector({json.dumps(selector)})?.getClientRects().length > 0")
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        QTest.mouseClick(self._input(), Qt.MouseButton.LeftButton, pos=QPoint(round(x), round(y)))
        self.app.processEvents()

    def press(self, key):
        """A real key, such as ``Tab`` or ``Right``."""
        from PyQt6.QtCore import Qt
        from PyQt6.QtTest import QTest

        QTest.keyClick(self._input(), getattr(Qt.Key, f"Key_{key}"))
        self.app.processEvents()

    def type(self, text):
        from PyQt6.QtTest import QTest

        QTest.keyClicks(self._input(), text)
        self.app.processEvents()

    def screenshot(self, file):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            self.app.processEvents()
        self.view.grab().save(str(file))


if __name__ == "__main__":
    # browser.py [PAGE EXPRESSION]
    page, expression = sys.argv[1:] or ("", "6 * 7")
    with Browser() as browser:
        print(json.dumps(browser.open(page).run(expression)))
