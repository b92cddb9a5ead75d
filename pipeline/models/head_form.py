"""Former name of `head_export`, until its last importers are changed."""

from __future__ import annotations

import sys

from pipeline.models import head_export
from pipeline.models.head_export import HeadExport as HeadForm
from pipeline.models.head_export import export_head as head_form

vars(head_export).update(HeadForm=HeadForm, head_form=head_form)
sys.modules[__name__] = head_export
