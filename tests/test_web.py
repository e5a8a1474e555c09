"""--web: the windows in a real browser, headless Chromium.

| tests | subject |
|---|---|
| test_my_image.py | one image, the secret address, closed tabs |
| annotate.py | a folder in one tab |
| track_video.py | Ctrl-C |
| errors | tornado is missing, a prompt was given |
"""

import ast
import base64
import contextlib
import http.client
import re
import shlex
import signal
import socket

import cv2
import numpy as np
import pytest
import test_annotate
import test_track_video
import test_window
from conftest import ENV, ROOT, SMALL_CFG, assert_fails_in_one_line, run
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from test_window import NO_DISPLAY, RealWindow, draw_discs, masks_in

import test_my_image

DEMO = ("--model-cfg", SMALL_CFG, "--finetuned", ROOT / "demo/sam2_demo.pt", "--device", "cpu")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WebWindow(RealWindow):
    """A script whose window is in a browser; its tests wait for the drawings that the script reports."""

    def __init__(self, folder, browser, *arguments, driver=test_window.DRIVER):
        self.browser = browser
        super().__init__(folder, "", *arguments, "--web", free_port(), driver=driver)
        line = self.read_until("브라우저에서 여세요: ")
        self.address, port = re.match(r"(http://127\.0\.0\.1:(\d+)/\w{32})/", line).groups()
        self.port = int(port)
        assert f"ssh -L {self.port}:127.0.0.1:{self.port} " in self.read_until("다른 컴퓨터에서 보려면")

    def open(self, name, *state):
        self.browser.get(self.address + "/")
        self.wait_for(name, *state)

    def at(self, x, y):
        """Actions that begin with moving to image pixel (x, y)."""
        left, top, right, bottom = self.corners
        place = self.browser.find_element(By.CSS_SELECTOR, "canvas.mpl-canvas")
        size = place.size
        return ActionChains(self.browser, duration=50).move_to_element_with_offset(
            place, round(left + x / 100 * (right - left) - size["width"] / 2),
            round(top + y / 100 * (bottom - top) - size["height"] / 2))

    def click(self, x, y, button=1):
        actions = self.at(x, y)
        (actions.click() if button == 1 else actions.context_click()).perform()

    def drag(self, start, end):
        left, top, right, bottom = self.corners
        across, down = ((end[0] - start[0]) / 100 * (right - left), (end[1] - start[1]) / 100 * (bottom - top))
        self.at(*start).click_and_hold().move_by_offset(round(across / 2), round(down / 2)).move_by_offset(
            round(across) - round(across / 2), round(down) - round(down / 2)).release().perform()

    def picture(self):
        """What the browser shows: uint8 H x W x 3."""
        address = self.browser.execute_script("return document.querySelector('canvas.mpl-canvas').toDataURL()")
        return cv2.imdecode(np.frombuffer(base64.b64decode(address.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)

    def key(self, key):
        ActionChains(self.browser).send_keys(key).perform()


def status_of(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


def test_one_image_in_a_browser_gives_the_mask_of_the_command_line(tmp_path, browser):
    draw_discs(tmp_path / "a.png")
    with WebWindow(tmp_path, browser, "--image", "a.png", "-o", "clicked") as window:
        window.open("a.png")
        secret = window.address.rpartition("/")[2]
        websocket = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                     "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw=="}
        for path in ("/", "/1", "/1/ws", "/js/mpl.js", f"/{'0' * 32}/", f"/{'0' * 32}/1/ws"):  # without the secret
            assert status_of(window.port, path, **websocket) == 404
        assert status_of(window.port, f"/{secret}/1/ws", **websocket, Origin="http://example.org") == 403
        assert status_of(window.port, f"/{secret}/1") == 200
        window.click(40, 40)
        window.wait_for("a.png", points=1)
        window.at(95, 20).double_click().perform()  # two clicks and nothing that is dragged on
        window.wait_for("a.png", points=3)
        window.at(20, 60).perform()
        window.key("ㅕ")
        window.wait_for("a.png", points=2)
        window.key("u")
        window.wait_for("a.png", points=1)
        window.click(100, 20, 3)
        window.wait_for("a.png", points=2)
        window.drag((12, 12), (70, 69))
        window.wait_for("a.png", points=2, box=1)
        browser.get("about:blank")  # a closed tab ends nothing
        window.open("a.png", 0, 2, 1)
        WebDriverWait(browser, 60).until(lambda _: window.picture().std() > 10)  # not an empty page
        window.key(Keys.ENTER)
        output = window.end()
        assert "tornado" not in output  # no line for what was refused, or for /favicon.ico
        flags = shlex.split(re.search("창에서 준 프롬프트: (.*)", output)[1])
    (x1, y1, label1), (x2, y2, label2) = test_my_image.parse_points(flags[1])
    assert (label1, label2) == (1, 0) and (x1, y1, x2, y2) == pytest.approx((40, 40, 100, 20), abs=1)
    assert test_my_image.parse_boxes(flags[3])[0] == pytest.approx([12, 12, 70, 69], abs=1)
    run("test_my_image.py", "--image", "a.png", *DEMO, *flags, "-o", "typed", cwd=tmp_path)
    clicked, typed = (masks_in(tmp_path / folder)["a_mask"] for folder in ("clicked", "typed"))
    assert (clicked == typed).all() and clicked[40, 40] and not clicked[80, 110]


def test_a_folder_is_labeled_in_one_browser_tab_and_q_ends_it(tmp_path, browser):
    for name in "abc":
        draw_discs(tmp_path / f"images/{name}.png")
    with WebWindow(tmp_path, browser, "--images", "images", "--output", "masks",
                   driver=test_annotate.DRIVER) as window:
        window.open("a.png")
        window.click(40, 40)
        window.wait_for("a.png", points=1)
        window.key("n")
        window.wait_for("a.png", finished=1)
        window.click(110, 80)
        window.wait_for("a.png", finished=1, points=1)
        window.key(Keys.ENTER)
        window.wait_for("b.png")  # in the same tab
        origin = ScrollOrigin.from_viewport(700, 300)
        before = window.corners
        ActionChains(browser).scroll_from_origin(origin, 0, -100).perform()
        while window.corners == before:
            window.wait_for("b.png")
        assert window.corners[2] - window.corners[0] == pytest.approx((before[2] - before[0]) * 1.25, abs=1)
        window.click(70, 60)
        window.wait_for("b.png", points=1)
        points = ast.literal_eval(window.output.splitlines()[-1].split(" ", 9)[9])
        assert points == [pytest.approx((70, 60, 1), abs=0.5)]  # in pixels of the image, though zoomed
        window.key("s")
        window.wait_for("c.png")
        window.key("q")
        assert "이미지 1장을 라벨링했습니다" in (output := window.end()) and "c.png" in output
    labels = masks_in(tmp_path / "masks")["a"]
    assert (labels[40, 40], labels[80, 110], labels[5, 5]) == (1, 2, 0)


def test_ctrl_c_ends_the_tracking_window_in_a_browser(tmp_path, browser):
    test_track_video.save_folder(tmp_path / "frames", test_track_video.draw_clip()[0])
    driver = test_track_video.TRACKING_DRIVER.format(folder=str(ROOT / "extras"), script="track_video")

    class Tracking(WebWindow):
        wait_for = test_track_video.TrackingWindow.wait_for

    with Tracking(tmp_path, browser, "--video", "frames", "-o", "out", driver=driver) as window:
        window.open("frames")
        window.click(20, 20)
        window.wait_for("frames", 0, 1, 1)
        window.script.send_signal(signal.SIGINT)
        assert window.end(code=1).splitlines()[-1] == "오류: 중단했습니다"
    assert not (tmp_path / "out/overlay.mp4").exists()


def test_web_without_tornado_with_a_prompt_or_with_an_unusable_port_is_refused(tmp_path):
    draw_discs(tmp_path / "a.png")
    done = run("test_my_image.py", "--image", "a.png", *DEMO, "--web", cwd=tmp_path, code=1, env=NO_DISPLAY,
               before="sys.modules['tornado'] = None")
    assert_fails_in_one_line(done, "pip install tornado")
    done = run("test_my_image.py", "--image", "a.png", *DEMO, "--web", "--point", "5,5", cwd=tmp_path, code=2)
    assert "--web" in done.stderr.splitlines()[-1]
    done = run("test_my_image.py", "--image", "a.png", *DEMO, "--web", 70000, cwd=tmp_path, code=1, env=ENV)
    assert_fails_in_one_line(done, "--web 70000", "65535")
    done = run("test_my_image.py", "--image", "a.png", *DEMO, "--web", 80, cwd=tmp_path, code=1, before="""
import tornado.web
def listen(*_):
    raise PermissionError(13, "Permission denied")
tornado.web.Application.listen = listen""")
    assert_fails_in_one_line(done, "브라우저에 창을 띄울 수 없습니다", "Permission denied")
