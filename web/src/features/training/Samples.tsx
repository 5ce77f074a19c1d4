import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { ActionIcon, Button, Group, Stack, Text, Textarea } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { MAX_SAMPLE_CHARS, MAX_SAMPLES } from './form';
import type { Piece } from './LayersForm';

/** What the model is asked again and again while it learns. */
export function Samples({ form, set }: Piece) {
  const { t } = useTranslation();
  const { samples } = form;
  const ofPictures = form.kind === 'pictures';
  const concept = ofPictures ? form.concept.prompt.trim() : '';
  const add = (prompt: string) => set({ samples: [...samples, prompt] });
  return (
    <Fold
      title={t(ofPictures ? 'pictured.samplesTitle' : 'hyper.samples')}
      mark={samples.some((prompt) => prompt.trim() !== '')}
    >
      <Stack gap="sm" align="flex-start">
        <Text size="sm" c="dimmed">
          {t(ofPictures ? 'pictured.samplesText' : 'hyper.samplesText')}
        </Text>
        {samples.map((prompt, i) => (
          <Group key={i} gap="xs" wrap="nowrap" align="flex-end" w="100%">
            <Textarea
              flex={1}
              label={t(ofPictures ? 'pictured.samplePrompt' : 'hyper.sample', { n: i + 1 })}
              value={prompt}
              onChange={(event) => {
                const text = event.currentTarget.value;
                set({ samples: samples.map((each, at) => (at === i ? text : each)) });
              }}
              maxLength={MAX_SAMPLE_CHARS}
              autosize
              minRows={1}
              maxRows={6}
            />
            <ActionIcon
              variant="subtle"
              color="gray"
              size="lg"
              aria-label={t(ofPictures ? 'pictured.sampleRemove' : 'hyper.sampleRemove', { n: i + 1 })}
              onClick={() => set({ samples: samples.filter((_, at) => at !== i) })}
            >
              <Icon name="trash" size={17} />
            </ActionIcon>
          </Group>
        ))}
        {samples.length < MAX_SAMPLES ? (
          <Group gap="xs">
            {concept && !samples.includes(concept) ? (
              <Add label={t('pictured.sampleConcept', { prompt: concept })} onClick={() => add(concept)} />
            ) : null}
            <Add label={t(ofPictures ? 'pictured.sampleAdd' : 'hyper.sampleAdd')} onClick={() => add('')} />
          </Group>
        ) : null}
      </Stack>
    </Fold>
  );
}

function Add({ label, onClick }: { label: string; onClick: () => void }) {
  return (
    <Button variant="light" size="compact-sm" leftSection={<Icon name="plus" size={16} />} onClick={onClick}>
      {label}
    </Button>
  );
}
