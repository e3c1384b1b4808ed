// Without this the videos still play, each by itself. With it those of one prompt keep step, so that the same moment stands
// side by side; those out of sight rest; and one button stops them all.
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
  const align = (scene) => {
    const [leader, ...others] = videos(scene);
    others.forEach((video) => {
      const apart = Math.abs(video.currentTime - leader.currentTime);
      if (Math.min(apart, leader.duration - apart) > 0.15) video.currentTime = leader.currentTime;
    });
  };
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
  setInterval(() => { if (!paused) visible.forEach(align); }, 1000);
  update();
})();
