import { api, ApiError, download } from '@/lib/api';
import {
  checkpoint,
  type Concept,
  fileReport,
  grown,
  job,
  type Job,
  type Layers,
  list,
  modelLayers,
  pictureReport,
  preview,
  report,
} from '@/types/api';
import { infiniteQueryOptions, queryOptions } from '@tanstack/react-query';
import type { Row } from '@/features/generate/example';
import type { HyperValue } from './form';

export const JOBS_A_PAGE = 20;

export const jobsQuery = infiniteQueryOptions({
  queryKey: ['jobs'],
  queryFn: ({ pageParam, signal }) =>
    api.get(`/v1/fine_tuning/jobs?limit=${JOBS_A_PAGE}${pageParam ? `&after=${pageParam}` : ''}`, list(job), signal),
  initialPageParam: '',
  getNextPageParam: (page) => (page.has_more ? page.data.at(-1)?.id : undefined),
  refetchInterval: 4_000,
});

export const jobQuery = (id: string) =>
  queryOptions({ queryKey: ['jobs', id], queryFn: ({ signal }) => api.get(`/v1/fine_tuning/jobs/${id}`, job, signal) });

/** Steps of those that are kept, the newest first. They go with the end of the job. */
export const checkpointsQuery = (id: string) =>
  queryOptions({
    queryKey: ['checkpoints', id],
    queryFn: async ({ signal }) =>
      (await api.get(`/v1/fine_tuning/jobs/${id}/checkpoints`, list(checkpoint), signal)).data.map(
        (each) => each.step_number,
      ),
    refetchInterval: 10_000,
  });

const path = (model: string) => model.split('/').map(encodeURIComponent).join('/');

/** `component`: of a model that is more than one network. */
export const layersQuery = (model: string, component: string | null = null) =>
  queryOptions({
    queryKey: ['layers', model, component],
    queryFn: ({ signal }) =>
      api.get(`/v1/models/${path(model)}/layers${component ? `?component=${component}` : ''}`, modelLayers, signal),
    staleTime: Infinity, // a model's layers do not change
  });

/** What a choice of layers costs. Asked anew with every change, so the key is the choice. */
export const previewQuery = (model: string, spec: Layers, training: Training) =>
  queryOptions({
    queryKey: ['preview', model, spec, training],
    queryFn: ({ signal }) => api.post('/v1/layers/preview', { model, layers: spec, ...training }, preview, signal),
    retry: false,
    staleTime: 60_000,
  });

/** What decides how long it takes; the data set once one is chosen. */
export interface Training {
  data?: { rows: number; bytes: number };
  concept?: Concept;
  hyperparameters: Record<string, HyperValue>;
}

export interface NewJob {
  model: string;
  training_file: string;
  suffix?: string;
  validation_file?: string;
  sample_prompts?: string[];
  concept?: Concept;
  layers: Layers;
  method: { type: 'supervised'; supervised: { hyperparameters: Record<string, HyperValue> } };
}

export const createJob = (asked: NewJob): Promise<Job> => api.post('/v1/fine_tuning/jobs', asked, job);
export const cancelJob = (id: string): Promise<Job> => api.post(`/v1/fine_tuning/jobs/${id}/cancel`, {}, job);
export const pauseJob = (id: string): Promise<Job> => api.post(`/v1/fine_tuning/jobs/${id}/pause`, {}, job);
export const resumeJob = (id: string): Promise<Job> => api.post(`/v1/fine_tuning/jobs/${id}/resume`, {}, job);
/** Of a job whose training has diverged: from its last checkpoint, at half its learning rate. */
export const resumeSlower = (id: string): Promise<Job> =>
  api.post(`/v1/fine_tuning/jobs/${id}/resume`, { learning_rate_factor: 0.5 }, job);

/** What the run has written about itself; null for runs that wrote nothing. */
export const reportQuery = (id: string) =>
  queryOptions({
    queryKey: ['report', id],
    queryFn: async ({ signal }) => {
      try {
        return await api.get(`/v1/fine_tuning/jobs/${id}/report`, report, signal);
      } catch (error) {
        if (error instanceof ApiError && error.status === 404) return null;
        throw error;
      }
    },
    staleTime: Infinity,
  });

export const downloadReport = (id: string): Promise<void> =>
  download(`/v1/fine_tuning/jobs/${id}/report.html`, `report-${id}.html`);

/** What is in a file; with a model, what that model sees of it, which takes a gpu. */
export const fileReportQuery = (id: string, model: string | null, maxLength: number | null, trainOn: string | null) =>
  queryOptions({
    queryKey: ['file-report', id, model, maxLength, trainOn],
    queryFn: ({ signal }) => {
      const query = new URLSearchParams();
      if (model) query.set('model', model);
      if (model && maxLength) query.set('max_length_tokens', String(maxLength));
      if (model && trainOn) query.set('train_on', trainOn);
      return api.get(`/v1/files/${id}/report?${query}`, fileReport, signal);
    },
    retry: false,
    staleTime: 60_000,
  });

/** What is in a zip of pictures, with some of them. */
export const pictureReportQuery = (id: string) =>
  queryOptions({
    queryKey: ['file-report', id],
    queryFn: ({ signal }) => api.get(`/v1/files/${id}/report`, pictureReport, signal),
    retry: false,
    staleTime: 60_000,
  });

export const addRows = (id: string, rows: readonly Row[]) => api.post(`/api/datasets/${id}/rows`, { rows }, grown);
export const createDataset = (name: string, rows: readonly Row[]) => api.post('/api/datasets', { name, rows }, grown);
