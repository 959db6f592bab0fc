"""The page of a finished run: results/<run>/report.html, one file with everything inside it.

- It reads what the stages left in the folder: metrics.json, retrieved.parquet when there is one,
  and every PNG. The images of the test set and their scores are passed in.
- Images are embedded and nothing is fetched, so the page can be mailed or archived; all text is
  escaped.
- A score is shown with its interval, floors and ceiling, and with a plain sentence on whether it
  beats the floors.
- `gallery_widget` browses the same images in a notebook.
"""

from src.evaluation.report.page import write_report
from src.evaluation.report.widget import gallery_widget

__all__ = ["gallery_widget", "write_report"]
