import { BackLink } from '@/components/BackLink';
import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { filesQuery } from '@/features/files/queries';
import { modelsQuery } from '@/features/generate/queries';
import type { Job, Layers } from '@/types/api';
import { Button, Text, TextInput } from '@mantine/core';
import { useDebouncedValue } from '@mantine/hooks';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link, useLocation, useNavigate } from 'react-router';
import { BlockPicker } from './BlockPicker';
import { parseBlocks } from './blocks';
import { ConceptForm } from './ConceptForm';
import { DataPicker } from './DataPicker';
import { DataReport } from './DataReport';
import {
  conceptOf,
  EMPTY,
  fit,
  formOf,
  hyperOf,
  layersOf,
  requestOf,
  suffixIsGood,
  type Form,
  type Part,
} from './form';
import { HyperForm } from './HyperForm';
import { LayerPicker } from './LayerPicker';
import { parseLayers } from './layers';
import { AsJson, ComponentPicker, Finer, MethodPicker, Parts } from './LayersForm';
import { kindOf, ModelChoice } from './ModelChoice';
import css from './NewJobPage.module.css';
import { PictureReport } from './PictureReport';
import { PreviewCard } from './PreviewCard';
import { Samples } from './Samples';
import { ValidationPicker } from './ValidationPicker';
import { createJob, layersQuery, type Training } from './queries';

const PREVIEW_AFTER_MS = 350;
const ENCODER_LAYERS = 24; // of the largest text encoder that is covered, until the model's own is known

export function NewJobPage() {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const queryClient = useQueryClient();
  const from = useLocation().state as { again?: Job; model?: string; file?: string } | null;
  const models = useQuery(modelsQuery);
  const all = models.data ?? [];
  const bases = all.filter((model) => !model.parent);
  const [kept, setForm] = useState<Form>(() =>
    from?.again ? formOf(from.again) : { ...EMPTY, model: from?.model ?? null, fileId: from?.file ?? null },
  );
  const files = useQuery(filesQuery('fine-tune')).data;
  const wanted = files?.find((each) => each.id === from?.file)?.kind ?? 'text'; // who brings a file, trains on it
  const usual = bases.filter((each) => kindOf(each) === wanted);
  const model =
    all.find((each) => each.id === kept.model) ?? usual.find((each) => each.available) ?? usual[0] ?? bases[0];
  const kind = model ? kindOf(model) : 'text';
  const form = model ? fit(kept, kind) : kept; // until the models are known, nothing is judged
  const set = (fields: Partial<Form>) => setForm((before) => ({ ...(model ? fit(before, kind) : before), ...fields }));

  const ofPictures = kind === 'pictures';
  const file = files?.find((each) => each.id === form.fileId);
  const fileId = file && file.kind !== kind ? null : form.fileId;
  const captioned = !file || Boolean(file.captioned);
  const filled = { ...form, fileId, model: model?.id ?? null };
  const component = ofPictures ? form.component : null;
  const structure = useQuery({ ...layersQuery(model?.id ?? '', component), enabled: model?.available === true });
  const blocks = structure.data?.layers.flatMap(({ block }) => block ?? []) ?? [];
  const nLayers = component ? (structure.data?.n_layers ?? ENCODER_LAYERS) : (model?.n_layers ?? 0);
  const parsed =
    component === 'unet' ? parseBlocks(form.layers, blocks) : model ? parseLayers(form.layers, nLayers) : null;
  const layers = layersOf(filled);
  const chosen = form.json.trim() !== '' || parsed?.ok;
  const concept = captioned ? null : conceptOf(form);
  const training: Training = {
    hyperparameters: hyperOf(form),
    ...(file?.rows && fileId ? { data: { rows: file.rows, bytes: file.bytes } } : {}),
    ...(ofPictures && concept ? { concept } : {}),
  };
  const readable = chosen && layers ? JSON.stringify({ layers, training }) : null;
  const [settled] = useDebouncedValue(readable, PREVIEW_AFTER_MS);
  const shown = settled ? (JSON.parse(settled) as { layers: Layers; training: Training }) : null;
  const request = chosen ? requestOf(filled, captioned && !(form.concept.prompt && !file)) : null;

  const { max_length_tokens: length, train_on: trainOn } = form.hyper;

  const starting = useMutation({
    mutationFn: createJob,
    onSuccess: async (job) => {
      await queryClient.invalidateQueries({ queryKey: ['jobs'] });
      await navigate(`/training/${job.id}`);
    },
  });

  const back = <BackLink to="/training">{t('job.allJobs')}</BackLink>;
  if (models.isSuccess && bases.length === 0) {
    return (
      <Page title={t('training.new')} above={back}>
        <Empty title={t('generate.noModels')} text={t('generate.noModelsText')}>
          <Button component={Link} to="/gpus" leftSection={<Icon name="chip" />}>
            {t('generate.connect')}
          </Button>
        </Empty>
      </Page>
    );
  }
  return (
    <Page title={t('training.new')} above={back} wide>
      <form
        className={css.columns}
        onSubmit={(event) => {
          event.preventDefault();
          if (request) starting.mutate(request);
        }}
      >
        <div className={css.steps}>
          <Card title={t('training.stepModel')}>
            {models.isError ? <ErrorNote error={models.error} /> : null}
            <ModelChoice models={all} value={model ?? null} onChange={(id) => set({ model: id })} />
          </Card>
          <Card title={t(ofPictures ? 'pictured.dataTitle' : 'training.stepData')}>
            <DataPicker key={kind} kind={kind} value={fileId} onChange={(chosen) => set({ fileId: chosen })} />
            {fileId && ofPictures ? <PictureReport fileId={fileId} /> : null}
            {fileId && ofPictures && !captioned ? <ConceptForm form={form} set={set} /> : null}
            {fileId && !ofPictures ? (
              <DataReport
                fileId={fileId}
                model={model?.available ? model.id : null}
                maxLength={typeof length === 'number' ? length : null}
                trainOn={typeof trainOn === 'string' ? trainOn : null}
              />
            ) : null}
            <ValidationPicker form={form} set={set} />
          </Card>
          <Card title={t('training.stepLayers')}>
            {form.json.trim() === '' ? (
              <>
                {ofPictures ? <ComponentPicker form={form} set={set} /> : null}
                <MethodPicker form={form} set={set} />
                <Parts form={form} set={set} has={(part) => hasPart(structure.data?.parts, part)} />
                {component === 'unet' ? (
                  <BlockPicker blocks={blocks} value={form.layers} onChange={(layers) => set({ layers })} />
                ) : model ? (
                  <LayerPicker n={nLayers} value={form.layers} onChange={(layers) => set({ layers })} />
                ) : null}
                <Finer form={form} set={set} />
              </>
            ) : null}
            <AsJson form={form} set={set} />
          </Card>
          <Card>
            <TextInput
              label={t('training.suffix')}
              description={t('training.suffixText')}
              placeholder="captain"
              value={form.suffix}
              onChange={(event) => set({ suffix: event.currentTarget.value })}
              error={suffixIsGood(form.suffix) ? null : t('training.suffixBad')}
              maxLength={64}
              spellCheck={false}
              autoComplete="off"
            />
            <HyperForm form={form} set={set} />
            <Samples form={form} set={set} />
          </Card>
        </div>
        <aside className={css.summary} aria-label={t('training.preview')}>
          <Card title={t('training.preview')}>
            <PreviewCard
              model={model?.id ?? null}
              spec={shown && readable ? shown.layers : null}
              training={shown?.training ?? training}
            />
            {starting.error ? <ErrorNote error={starting.error} /> : null}
            {fileId ? null : (
              <Text size="sm" c="dimmed">
                {t(ofPictures ? 'pictured.needData' : 'training.needData')}
              </Text>
            )}
            {fileId && ofPictures && !captioned && !concept ? (
              <Text size="sm" c="dimmed">
                {t('pictured.needConcept')}
              </Text>
            ) : null}
            <Button type="submit" size="md" disabled={!request} loading={starting.isPending}>
              {t('training.start')}
            </Button>
          </Card>
        </aside>
      </form>
    </Page>
  );
}

/** Until the model's structure is known, everything is offered. A tied head, for one, is none. */
function hasPart(parts: Record<string, number> | undefined, part: Part): boolean {
  return !parts || Object.keys(parts).some((name) => name === part || name.startsWith(`${part}.`));
}
