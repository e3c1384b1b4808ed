// Without this the videos still play, each by itself. With it those of one prompt start together, so that the same moment
// stands side by side; those out of sight rest; and one button stops them all.
(() => {
  const scenes = document.querySelectorAll(".scene");
  const button = document.querySelector("#pause");
  if (!button) return;
  const videos = (scene) => [...scene.querySelectorAll("video")];
  const visible = new Set();
  let paused = matchMedia("(prefers-reduced-motion: reduce)").matches;

  const start = (scene) => videos(scene).forEach((video) => {
    video.currentTime = 0;
    video.play().catch(() => {}); // stopped again before it began
  });
  const stop = (scene) => videos(scene).forEach((video) => video.pause());
  const update = () => {
    button.textContent = paused ? "Play videos" : "Pause videos";
    scenes.forEach((scene) => (visible.has(scene) && !paused ? start(scene) : stop(scene)));
  };

  button.hidden = false;
  button.addEventListener("click", () => { paused = !paused; update(); });
  const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) visible.add(entry.target); else visible.delete(entry.target);
    if (entry.isIntersecting && !paused) start(entry.target); else stop(entry.target);
  }));
  scenes.forEach((scene) => watcher.observe(scene));
  update();
})();
