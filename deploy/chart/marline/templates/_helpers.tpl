{{- define "marline.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "marline.labels" -}}
app.kubernetes.io/part-of: marline
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "marline.unprivileged" -}}
# Root in name alone: no capability, no other privilege.
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}
