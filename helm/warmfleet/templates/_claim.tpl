{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* The claim of each pod to its GPUs, by dynamic resource allocation. */}}

{{- define "warmfleet.claim" -}}
spec:
  devices:
    requests:
      - name: gpu
        exactly:
          deviceClassName: {{ .Values.gpu.dra.deviceClassName | quote }}
          allocationMode: ExactCount
          count: {{ .Values.gpu.count }}
          {{- with .Values.gpu.dra.selectors }}
          selectors:
            {{- range . }}
            - cel:
                expression: {{ . | quote }}
            {{- end }}
          {{- end }}
    {{- with .Values.gpu.dra.config }}
    config:
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end -}}

{{/* A template of claims cannot be changed, so one that says something else has another name. */}}
{{- define "warmfleet.claimName" -}}
{{- printf "%s-%s" (include "warmfleet.fullname" .) (include "warmfleet.claim" . | sha256sum | trunc 8) -}}
{{- end -}}
